"""How many sequences fit: by the model's shapes and the free memory, never fewer than one."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from utils import memory
from utils.memory import bytes_per_sequence, is_out_of_memory, sequences_that_fit
from utils.platforms import GIB

LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip


def test_an_8b_models_cache_takes_128_kib_a_token():
    longer, shorter = (bytes_per_sequence(LLAMA_8B, 200, new, 2) for new in (1200, 1000))
    assert longer - shorter == 200 * 128 * 1024


def test_long_prompts_are_counted_by_their_forward_pass():
    assert bytes_per_sequence(LLAMA_8B, 4000, 8, 2) > 4512 * 128 * 1024 + 16 * 128_256


def test_on_a_t4_some_dozens_of_8b_sequences_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(7.6 * GIB))

    class Model:
        config, dtype, device = LLAMA_8B, torch.float16, torch.device("cuda")

    assert 60 <= sequences_that_fit(Model, 180, 512) <= 100
    assert 25 <= sequences_that_fit(Model, 1200, 512) <= 40


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
