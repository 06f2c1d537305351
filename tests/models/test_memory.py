"""How many sequences fit: by the model's shapes and the free memory, never fewer than one."""

from __future__ import annotations

import weakref

import pytest
import torch
from transformers import LlamaConfig

from utils.hardware import GIB
from utils.models import memory
from utils.models.memory import bytes_per_sequence, free_memory, is_out_of_memory, sequences_that_fit

LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip


def test_an_8b_models_cache_takes_128_kib_a_token():
    longer, shorter = (bytes_per_sequence(LLAMA_8B, 200, new, 2) for new in (1200, 1000))
    assert longer - shorter == pytest.approx(1.05 * 200 * 128 * 1024, abs=2)


@pytest.mark.parametrize(("prompt", "measured_mib"), [(256, 61.7), (760, 182.2), (1272, 305.4)])
def test_the_estimate_is_a_little_above_what_was_measured(prompt, measured_mib):
    """36 new tokens, fp16, on an H200 with a T4's attention; the estimate must hold without wasting a third."""
    assert measured_mib < bytes_per_sequence(LLAMA_8B, prompt, 36, 2) / 2**20 < 1.3 * measured_mib


def test_on_a_t4_some_dozens_of_8b_sequences_fit(monkeypatch, tiny_model):
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(7.8 * GIB))

    class Model:
        config, dtype, device = LLAMA_8B, torch.float16, torch.device("cuda")

        def modules(self):
            return []

    assert 55 <= sequences_that_fit(Model(), 250, 512) <= 90
    assert 18 <= sequences_that_fit(Model(), 1200, 512) <= 30


def test_the_last_batch_is_freed_before_the_next_one_is_sized(tiny_model, monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(memory, "forget_cache", lambda model: order.append("forget"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("empty"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: order.append("count") or GIB)
    sequences_that_fit(tiny_model[0], 10, 10)
    assert order == ["forget", "empty", "count"]


def test_one_sequence_is_always_tried(tiny_model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert sequences_that_fit(tiny_model[0], 100, 100) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [(torch.OutOfMemoryError("CUDA out of memory."), True), (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True), (RuntimeError("shape"), False)],
)  # fmt: skip
def test_running_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_free_memory_of_a_cpu_is_the_machines():
    assert 0 < memory.free_bytes(torch.device("cpu")) < 10**14


@pytest.mark.parametrize("named", [False, True])
def test_freeing_memory_collects_cycles_and_a_named_models_kept_cache(monkeypatch, named):
    """An interrupted batch leaves cycles behind, and unsloth keeps its cache on the modules."""
    emptied, module = [], torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(left() is None))
    for name in ("paged_attention", "paged_attention_K", "paged_attention_V"):
        setattr(module, name, torch.zeros(1))
    cycle = torch.nn.Linear(1, 1)
    cycle.self = [cycle]
    left = weakref.ref(cycle)
    del cycle
    free_memory(module if named else None)
    assert emptied == [True]  # blocks go back to the driver only after what held them is gone
    assert hasattr(module, "paged_attention_K") is not named
