"""Packed rows must not see each other: which attention is chosen, and that the plain backend never packs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from benchmarks.recipe import notebook_functions
from utils.models import unsloth_patches as packing
from utils.models.unsloth_patches import attend_within_documents, choose_attention
from utils.project import ROOT
from utils.training.step_plan import StepPlan

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; evidence in train.json")


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
    found = json.loads((ROOT / "benchmarks" / "results" / "train.json").read_text(encoding="utf-8"))["boundary"]
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
