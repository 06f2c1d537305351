"""Model files that nobody should have written: shards, indices, adapters. Each ends in a sentence or is read right."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from tests.faults.fuzzing import mutated_bytes, mutated_values, survive, to_json
from utils.export.merge import INDEX, SINGLE, find_shards, list_tensors, read_lora
from utils.models.tokenizer import load_tokenizer

HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"], "bias": "none",
            "use_rslora": False, "task_type": "CAUSAL_LM", "base_model_name_or_path": "x"}  # fmt: skip


def shard_bytes(header: bytes, data: bytes = bytes(range(32))) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def check_shard(path: Path) -> None:
    found, _ = survive(list_tensors, [path])
    for place, _, shape in (found or {}).values():
        assert place == path and all(number >= 0 for number in shape)


def test_a_damaged_shard_ends_in_a_sentence_or_its_tensors(tmp_path, fuzz):
    path = tmp_path / SINGLE

    def check(data: bytes) -> None:
        path.write_bytes(data)
        check_shard(path)

    fuzz.run("shards: bytes", 1500, mutated_bytes([shard_bytes(to_json(HEADER))]), check)


def test_a_shards_header_of_another_shape_ends_in_a_sentence_or_its_tensors(tmp_path, fuzz):
    path = tmp_path / SINGLE

    def check(value) -> None:
        path.write_bytes(shard_bytes(to_json(value)))
        check_shard(path)

    fuzz.run("shards: headers", 1500, mutated_values([HEADER]), check)


def test_an_index_of_another_shape_ends_in_a_sentence_or_its_shards(tmp_path, fuzz):
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in names:
        (tmp_path / name).write_bytes(shard_bytes(to_json(HEADER)))
    index = {"metadata": {"total_size": 64}, "weight_map": {"a.weight": names[0], "c.weight": names[1]}}

    def check(value) -> None:
        (tmp_path / INDEX).write_bytes(to_json(value))
        shards, _ = survive(find_shards, tmp_path)
        for shard in shards or ():
            assert shard.resolve().parent == tmp_path.resolve()

    fuzz.run("shards: indices", 700, mutated_values([index]), check)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    import peft  # noqa: F401  (takes longer than a case may)
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("adapter")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(3, 2)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_bytes(to_json(SETTINGS))
    return folder


def check_lora(folder: Path) -> None:
    lora, _ = survive(read_lora, folder)
    if lora is not None:
        assert lora.factors and math.isfinite(lora.scale)
        for a, b in lora.factors.values():
            assert a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] > 0


def test_an_adapters_settings_of_another_shape_end_in_a_sentence_or_a_lora(adapter, fuzz):
    def check(value) -> None:
        (adapter / "adapter_config.json").write_bytes(to_json(value))
        check_lora(adapter)

    try:
        fuzz.run("adapters: settings", 600, mutated_values([SETTINGS]), check)
    finally:
        (adapter / "adapter_config.json").write_bytes(to_json(SETTINGS))


def test_a_damaged_adapter_ends_in_a_sentence_or_a_lora(adapter, fuzz):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()

    def check(data: bytes) -> None:
        file.write_bytes(data)
        check_lora(adapter)

    try:
        fuzz.run("adapters: bytes", 600, mutated_bytes([whole]), check)
    finally:
        file.write_bytes(whole)


def test_a_damaged_tokenizer_ends_in_a_sentence_or_keeps_text(tiny_folder, tmp_path, fuzz):
    whole = {name: (tiny_folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    value = json.loads(whole["tokenizer.json"])
    value["model"]["merges"] = value["model"]["merges"][:5]
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)

    def check(changed) -> None:
        (tmp_path / "tokenizer.json").write_bytes(to_json(changed))
        survive(load_tokenizer, tmp_path)

    few = {**value, "model": {**value["model"], "vocab": dict(list(value["model"]["vocab"].items())[:300])}}
    fuzz.run("tokenizers: values", 80, mutated_values([few]), check)
