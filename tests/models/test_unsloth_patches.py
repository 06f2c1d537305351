"""unsloth's patches: packed rows must not see each other, and whatever a patch is not made for stays with unsloth."""

from __future__ import annotations

import json
import sys
import weakref
from importlib.util import find_spec
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import trl.trainer

from benchmarks.recipe import notebook_functions
from utils.errors import HardwareError
from utils.models import unsloth_patches as packing
from utils.models.decode_graph import GROWTH, attend_by_groups
from utils.models.unsloth_patches import (
    MADE_FOR,
    attend_within_documents,
    choose_attention,
    decode_in_graphs,
    forget_cache,
    import_unsloth,
    multiply_4bit,
)
from utils.project import ROOT
from utils.training.step_plan import StepPlan

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; evidence in train-fast.json")


def test_unsloth_finds_the_one_trainer_to_rewrite_that_is_used(tmp_path, monkeypatch):
    looking = "import trl.trainer\nfrom importlib import util\nnames, found = dir(trl.trainer), util.find_spec"
    (tmp_path / "unsloth.py").write_text(
        f"{looking}\nexperimental, other = map(found, ('trl.experimental', 'trl.models'))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "unsloth", None)
    monkeypatch.delitem(sys.modules, "unsloth")
    import_unsloth()
    seen = sys.modules["unsloth"]
    assert {"SFTTrainer", "SFTConfig", "sft_trainer"} <= {*seen.names}
    assert not {"DPOTrainer", "dpo_trainer"} & {*seen.names} and seen.experimental is None and seen.other
    assert "DPOTrainer" in dir(trl.trainer) and find_spec("trl.experimental")  # for whoever looks later


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


def test_the_cache_that_unsloth_leaves_on_its_modules_is_freed():
    layer = torch.nn.Linear(2, 2)
    layer.paged_attention = layer.paged_attention_K = layer.paged_attention_V = layer.batch_decoder = torch.zeros(3)
    model = torch.nn.Sequential(layer, torch.nn.ReLU())
    forget_cache(model)
    assert not any(hasattr(layer, name) for name in ("paged_attention", "paged_attention_V", "batch_decoder"))
    forget_cache(model)  # and nothing to free is no error


def test_a_4bit_product_is_unsloths_for_few_rows_and_fused_where_that_pays(monkeypatch):
    rows, state, asked = torch.randn(5, 1, 64), SimpleNamespace(shape=torch.Size([96, 64])), []
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(matmul_4bit=lambda *given: given))
    few = lambda rows, *_: "unsloth's" if len(rows) == 2 else None  # noqa: E731
    multiply = multiply_4bit(few, lambda *shape: asked.append(shape) or shape[2] > 4)
    assert multiply(rows, "weight", state, "out") == (rows, "weight", state)
    assert multiply(rows[:3], "weight", state, "out") is None
    assert multiply(rows[:2], "weight", state, "out") == "unsloth's"
    assert asked == [(None, torch.float32, 5, 96, 64), (None, torch.float32, 3, 96, 64)]


@pytest.mark.parametrize("fused", [True, False])
def test_unsloth_is_patched_once_with_or_without_bitsandbytes_fused_products(monkeypatch, fused):
    llama = SimpleNamespace(run_attention=print, LlamaModel_fast_forward_inference=len, KV_CACHE_INCREMENT=512)
    kernels, ops = SimpleNamespace(_gemv_rows=repr, _GEMV_MAX_ROWS=4), SimpleNamespace()
    if fused:
        ops = SimpleNamespace(_gemm_4bit_use_custom_fn=min, _gemm_4bit_custom_max_m=1536)
    modules = {"unsloth.models": SimpleNamespace(llama=llama), "unsloth.kernels": SimpleNamespace(utils=kernels)}
    modules |= {
        "bitsandbytes": None,
        "bitsandbytes.backends": None,
        "bitsandbytes.backends.cuda": SimpleNamespace(ops=ops),
    }
    for name, module in {"unsloth": SimpleNamespace(), **modules}.items():
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace())
    monkeypatch.setattr(packing, "version", lambda _: MADE_FOR)
    packing.patch_unsloth()
    first = (llama.run_attention, llama.LlamaModel_fast_forward_inference, kernels._gemv_rows)
    packing.patch_unsloth()
    assert first == (llama.run_attention, llama.LlamaModel_fast_forward_inference, kernels._gemv_rows)
    assert first[0].keeps_documents_apart and first[1] is not len and llama.KV_CACHE_INCREMENT == GROWTH
    assert llama.scaled_dot_product_attention is attend_by_groups
    assert (kernels._gemv_rows is not repr, kernels._GEMV_MAX_ROWS) == ((True, 1536) if fused else (False, 4))


class Unsloth:
    """What `decode_in_graphs` wraps and is given: a causal model whose inner one keeps the decoder."""

    def __init__(self):
        self.model, self.single, self.asked = SimpleNamespace(layers=[SimpleNamespace(self_attn=self)]), [], []
        self.rotary_emb = self

    def extend_rope_embedding(self, like, length):
        self.asked.append((like.dtype, length))

    def get_cached(self, length, index):
        return "cosines", "sines"

    def pass_(self, ids, past, positions, attention_mask=None, **more):
        self.single.append((ids.tolist(), more))
        return "unsloth's"


@pytest.fixture
def decode(monkeypatch):
    """`decode_in_graphs` of an `Unsloth`, with a Decoder that notes its steps."""
    made, living = [], weakref.WeakSet()

    class Noted:
        def __init__(self, model, past, mask, linear, tables):
            self.cache, self.mask, self.linear, self.steps, self.tables = past, mask, linear, [], tables(7)
            self.beside = len(living)
            living.add(self)
            made.append(self)

        def past(self):
            return self.cache

        def step(self, ids, positions):
            self.steps.append((ids.tolist(), positions.tolist()))
            return len(self.steps)

    monkeypatch.setattr("utils.models.decode_graph.Decoder", Noted)
    monkeypatch.setitem(sys.modules, "unsloth.kernels", SimpleNamespace(fast_linear_forward="linear"))
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace())
    self = Unsloth()
    wrapped = decode_in_graphs(Unsloth.pass_)
    return self, made, lambda *given, **named: wrapped(self, *given, **named)


def test_a_batch_has_one_decoder_from_its_first_step_to_its_last(decode):
    self, made, step = decode
    for _ in range(2):
        past, ids = [(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4))], torch.tensor([[7], [8]])
        for number in range(3):
            mask, positions = torch.ones(2, 6 + number), torch.tensor([[3, 4 + number], [1, 2 + number]])
            output = step(ids, past, positions, attention_mask=mask)
            past = output.past_key_values
            assert output.last_hidden_state == number + 1
        assert len(made) == 1 and self.model.batch_decoder is made[-1]
        assert made[-1].mask.shape == (2, 5) and made[-1].linear == "linear"
        assert made[-1].tables == ("cosines", "sines") and self.asked[-1] == (torch.float32, 7)
        assert made[-1].beside == 0  # the batch before has given its memory back
        assert made[-1].steps == [([[7], [8]], [[4 + n], [2 + n]]) for n in range(3)]
        made.clear()
    assert self.single == []


@pytest.mark.parametrize(("rows", "mask"), [(1, torch.ones(1, 6)), (2, None), (2, torch.ones(2, 1, 1, 6))])
def test_a_single_sequence_or_another_mask_stays_with_unsloth(decode, rows, mask):
    self, made, step = decode
    past, positions = [(torch.zeros(rows, 1, 5, 4),) * 2], torch.tensor([[5]] * rows)
    assert step(torch.tensor([[7]] * rows), past, positions, attention_mask=mask, cache_position=5) == "unsloth's"
    assert self.single == [([[7]] * rows, {"cache_position": 5})] and made == []
