"""unsloth's patches: packed rows must not see each other, and attention by groups is torch's own in every shape and mask."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from benchmarks.recipe import notebook_functions
from utils.errors import HardwareError
from utils.models import unsloth_patches as packing
from utils.models.unsloth_patches import (
    MADE_FOR,
    attend_by_groups,
    attend_within_documents,
    choose_attention,
    forget_cache,
    free_copied_cache,
)
from utils.project import ROOT
from utils.training.step_plan import StepPlan

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; evidence in train-fast.json")


def call(**changed):
    """What `choose_attention` does with a packed half-precision call, one thing changed at a time."""
    query = SimpleNamespace(dtype=torch.float16, shape=(1, 4, 10, 8), is_cuda=True, device=SimpleNamespace(index=0))
    query.transpose = lambda a, b: "transposed"
    context = {"seq_info": (1, 2, 3), "attention_mask": None, "is_causal": True, "sliding_window": None, "prefix_seg_info": None}  # fmt: skip
    backend = changed.pop("backend", "sdpa")
    for name in [name for name in changed if name in context]:
        context[name] = changed.pop(name)
    for name, value in changed.items():
        setattr(query, name, value)
    attend = choose_attention(lambda **_: "unsloth's")
    return attend(
        config=SimpleNamespace(backend=backend), context=SimpleNamespace(**context), Q=query, K=query, V=query
    )


@pytest.fixture
def ours(monkeypatch):
    """Ours answers "ours", with a GPU that has no flash attention."""
    import sys

    monkeypatch.setattr(packing, "flash_attention", lambda index: False)
    monkeypatch.setattr(packing, "attend_within_documents", lambda *_: "ours")
    modules = {"unsloth": SimpleNamespace(), "unsloth.utils": SimpleNamespace()}
    modules["unsloth.utils.packing"] = SimpleNamespace(cover_padded_cu_seqlens=lambda info, total: (info, total))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_packed_rows_go_to_our_attention(ours):
    assert call() == call(dtype=torch.bfloat16) == "ours"


@pytest.mark.parametrize(
    "changed",
    [
        {"seq_info": None}, {"attention_mask": "one"}, {"is_causal": False}, {"sliding_window": 128},
        {"prefix_seg_info": "grouped"}, {"backend": "flash_varlen"}, {"backend": "xformers"}, {"dtype": torch.float32}, {"is_cuda": False},
        {"shape": (2, 4, 10, 8)},
    ],
)  # fmt: skip
def test_whatever_it_is_not_made_for_stays_with_unsloth(ours, changed):
    assert call(**changed) == "unsloth's"


def test_a_gpu_with_flash_attention_keeps_it(ours, monkeypatch):
    monkeypatch.setattr(packing, "flash_attention", lambda index: True)
    assert call() == "unsloth's"


@pytest.mark.gpu
@NEEDS_GPU
def test_the_kernel_gives_what_attention_document_by_document_gives():
    torch.manual_seed(0)
    lengths, heads, kv_heads, size = [3, 130, 64, 1, 200], 8, 2, 64
    total = sum(lengths)
    query, key, value = (
        torch.randn(1, total, n, size, device="cuda", dtype=torch.float16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    out = attend_within_documents(query, key, value, boundaries, max(lengths))
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (query, key, value))
    single = [x.detach().double().requires_grad_() for x in (query, key, value)]
    pieces = []
    for document in zip(*(x.split(lengths, dim=1) for x in single), strict=True):
        q, k, v = (x.transpose(1, 2) for x in document)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        pieces.append(attended.transpose(1, 2))
    expected = torch.cat(pieces, dim=1)
    wanted = torch.autograd.grad((expected * weight.double()).sum(), single)
    assert (out - expected).abs().max() < 5e-3
    assert all((a - b).abs().max() < 2e-2 for a, b in zip(grads, wanted, strict=True))


def test_the_evidence_shows_that_packed_rows_do_not_see_each_other():
    found = json.loads((ROOT / "benchmarks" / "results" / "train-fast.json").read_text(encoding="utf-8"))["boundary"]
    assert found["packed_against_alone"] < 0.1 < 1 < found["without_boundaries_against_alone"]
    assert found["packed_gradient_against_alone"] < 0.1


def test_the_plain_backend_never_packs_where_samples_would_see_each_other(training_run, tmp_path):
    run = training_run(train__packing=True)
    load_with_lora, make_trainer = notebook_functions()
    model, tokenizer = load_with_lora(run.config)
    rows = pd.read_parquet(run.file("data/formatted/train.parquet"))
    trainer = make_trainer(model, tokenizer, run.config, rows, StepPlan(4, 1, 0), str(tmp_path))
    assert len(trainer.train_dataset) == len(rows) and not trainer.args.packing
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert batch["input_ids"].shape[0] == 4  # each row a sequence of its own


def test_another_unsloth_than_the_pinned_one_is_refused_by_a_sentence(monkeypatch):
    assert f"unsloth=={MADE_FOR} " in (ROOT / "requirements.txt").read_text(encoding="utf-8")
    monkeypatch.setattr(packing, "version", lambda _: "2099.1.1")
    with pytest.raises(HardwareError, match=r"unsloth 2099\.1\.1 is installed; install "):
        packing.patch_unsloth()


def tensors(batch: int = 3, heads: int = 8, kv_heads: int = 2, length: int = 17, size: int = 16, count: int = 1):
    torch.manual_seed(0)
    query = torch.randn(batch, heads, count, size)
    # As unsloth keeps them: (length, 2, batch, kv_heads, size), of which keys and values are views.
    cache = torch.randn(length, 2, batch, kv_heads, size)
    return query, cache[:, 0].permute(1, 2, 0, 3), cache[:, 1].permute(1, 2, 0, 3)


def left_padding(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    for row in range(batch):
        mask[row, ..., : 2 * row] = False
    return mask


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_it_is_scaled_dot_product_attention(kv_heads, masked):
    query, key, value = tensors(kv_heads=kv_heads)
    mask = None if masked is None else left_padding(3, 17)
    if masked == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend_by_groups(query, key, value, attn_mask=mask, enable_gqa=True), expected)


def test_several_new_tokens_go_to_torch():
    query, key, value = tensors(count=17)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend_by_groups(query, key, value, is_causal=True, enable_gqa=True), expected)


def test_half_precision_does_not_overflow_where_the_product_before_scaling_would():
    query, key, value = (tensor.half() * 60 for tensor in tensors(size=128))
    assert torch.isfinite(attend_by_groups(query, key, value, enable_gqa=True)).all()


def test_the_cache_that_unsloth_leaves_on_its_modules_is_freed():
    layer = torch.nn.Linear(2, 2)
    layer.paged_attention = layer.paged_attention_K = layer.paged_attention_V = torch.zeros(3)
    model = torch.nn.Sequential(layer, torch.nn.ReLU())
    forget_cache(model)
    assert not hasattr(layer, "paged_attention") and not hasattr(layer, "paged_attention_V")
    forget_cache(model)  # and nothing to free is no error


@pytest.mark.parametrize("first", [True, False])
def test_a_prompts_keys_are_freed_after_the_first_step_only(first):
    keys, values = torch.ones(2, 3), torch.ones(2, 3)
    attend = free_copied_cache(lambda self, hidden, past, position, do_prefill=False, **more: (past[0].sum(), more))
    total, more = attend(None, None, (keys, values), None, do_prefill=first, attention_mask=7)
    assert float(total) == 6 and more == {"attention_mask": 7}
    assert (keys.untyped_storage().size() == 0) is first
