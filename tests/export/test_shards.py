"""Shards are read by their headers alone, and a file that is not whole is told from one that is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import ModelError
from utils.export.shards import find_shards, read_shard


@pytest.fixture
def shard(tmp_path):
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "a": torch.tensor([1.5, -2.0]),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_every_tensor_is_found_where_its_bytes_are(shard):
    read, data = read_shard(shard), shard.read_bytes()
    assert data.startswith(read.head) and read.size == len(data)
    found = {tensor.name: tensor for tensor in read.tensors}
    assert found["b"].shape == (2, 3) and found["b"].dtype == "BF16" and found["count"].shape == ()
    assert torch.frombuffer(bytearray(data[found["a"].start : found["a"].stop]), dtype=torch.float32).tolist() == [
        1.5,
        -2.0,
    ]


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_file_that_was_cut_short_is_refused(shard, kept):
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ModelError, match="fetch it again"):
        read_shard(shard)


def test_a_header_that_lies_about_a_shape_is_refused(shard):
    shard.write_bytes(shard.read_bytes().replace(b'"shape":[2,3]', b'"shape":[9,3]'))
    with pytest.raises(ModelError, match="b does not have the size of its shape"):
        read_shard(shard)


def test_a_missing_shard_is_told_with_numbers_and_its_name(shard):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shard.rename(shard.with_name(names[0]))
    index = {"weight_map": {"a": names[0], "b": names[0], "c": names[1]}}
    shard.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks 1 of 2 shards, model-00002-of-00002\.safetensors first"):
        find_shards(shard.parent)


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(ModelError, match="holds neither"):
        find_shards(tmp_path)
