"""Model files that nobody should have written: shards, indices, adapters. Each ends in a sentence or is read right."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tests.faults.fuzzing import mutated_bytes, mutated_values, survive, to_json
from utils.export.merge import INDEX, SINGLE, find_shards, list_tensors
from utils.models.tokenizer import load_tokenizer

HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


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
