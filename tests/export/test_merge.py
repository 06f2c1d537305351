"""Merging: the right sum, rounded once, the same bytes every time, little memory, and a sentence for what does not fit."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from utils.errors import ModelError
from utils.export.merge import find_shards, list_tensors, merge_shards, read_lora
from utils.project import ROOT

PREFIX = "base_model.model."
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SHAPES = {NAMES[0]: (48, 32), NAMES[1]: (32, 96)}


def write_base(folder, dtype=torch.bfloat16, **extra):
    """Two shards with an index: two projections, a norm and an embedding."""
    torch.manual_seed(1)
    folder.mkdir()
    weights = {f"{name}.weight": (torch.randn(shape) * 0.1).to(dtype) for name, shape in SHAPES.items()}
    parts = [
        {f"{NAMES[0]}.weight": weights[f"{NAMES[0]}.weight"], "model.norm.weight": torch.ones(32).to(dtype), **extra},
        {
            f"{NAMES[1]}.weight": weights[f"{NAMES[1]}.weight"],
            "model.embed_tokens.weight": torch.randn(7, 32).to(dtype),
        },
    ]
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part, file in zip(parts, files, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for part, file in zip(parts, files, strict=True) for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder, tensors=None, shapes=SHAPES, r=4, **settings):
    torch.manual_seed(2)
    LoraConfig(r=r, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM").save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | settings))
    factors = {}
    for name, (rows, columns) in shapes.items():
        factors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, columns)
        factors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, r) * 0.05
    save_file(factors | (tensors or {}), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "out").mkdir()
    return write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter"), tmp_path / "out"


def read_all(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_computed_in_float32_and_rounded_once(tmp_path, dtype):
    base, adapter = write_base(tmp_path / "base", dtype), write_adapter(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    merge_shards(base, read_lora(adapter), tmp_path / "out")
    before, after, factors = (
        read_all(base),
        read_all(tmp_path / "out"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for name in NAMES:
        a, b = (factors[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
        exact = before[f"{name}.weight"].double() + 2.0 * (b @ a)
        # Half a unit in the last place for the one rounding, and a little for float32's own sums.
        unit = torch.finfo(dtype).eps * exact.abs() / 2 + 1e-6
        assert (after[f"{name}.weight"].double() - exact).abs().le(unit).all()
        assert not torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert torch.equal(after[name], before[name])


def test_peft_comes_to_the_same_sum(tiny_folder, tmp_path):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), LoraConfig(r=4, use_rslora=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    merge_shards(tiny_folder, read_lora(tmp_path / "adapter"), tmp_path / "out")
    theirs = model.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert any("q_proj" in name for name in ours)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def test_shards_that_come_one_by_one_are_merged_alike_and_go_again(pair, tmp_path):
    base, adapter, out = pair
    far, there = tmp_path / "far", tmp_path / "there"
    merge_shards(base, read_lora(adapter), out)
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    base.rename(far)
    for folder in (base, there):
        folder.mkdir()
    shutil.copy(far / "model.safetensors.index.json", base)
    fetched = []

    def fetch(names):
        assert not list(base.glob("*.safetensors"))
        fetched.extend(names)
        shutil.copy(far / names[0], base)

    merge_shards(base, read_lora(adapter), there, fetch)
    assert {path.name: path.read_bytes() for path in there.iterdir()} == expected
    assert fetched == [path.name for path in find_shards(far)] and not list(base.glob("*.safetensors"))
    wider, deeper = {NAMES[0]: (64, 32)}, {"model.layers.9.mlp.down_proj": (32, 96)}
    for name, shapes, match in (("wider", SHAPES | wider, "but in .* it is"), ("deeper", SHAPES | deeper, "missing")):
        with pytest.raises(ModelError, match=f"{match}.*it was trained on another base model"):
            merge_shards(base, read_lora(write_adapter(tmp_path / name, shapes=shapes)), there, fetch)
        for left in base.glob("*.safetensors"):
            left.unlink()


def test_names_dtypes_and_index_are_the_bases(pair):
    base, adapter, out = pair
    merge_shards(base, read_lora(adapter), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in base.iterdir())
    before, after = (list_tensors(find_shards(folder)) for folder in (base, out))
    assert {name: (path.name, *rest) for name, (path, *rest) in before.items()} == {
        name: (path.name, *rest) for name, (path, *rest) in after.items()
    }
    merged = {path: path.read_bytes() for path in out.iterdir()}
    merge_shards(base, read_lora(adapter), out)
    assert merged == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_shard_that_was_cut_short_is_refused_before_anything_is_written(pair, kept):
    base, adapter, out = pair
    shard = base / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is no whole .*fetch it again"):
        merge_shards(base, read_lora(adapter), out)
    assert list(out.iterdir()) == []


def test_a_missing_shard_is_told_with_numbers_and_its_name(pair, tmp_path):
    base, _, out = pair
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 2 shards \(model-00002-of-00002\.safetensors"):
        find_shards(base)
    with pytest.raises(ModelError, match=r"lacks 1 of 1 shards \(model\.safetensors"):
        find_shards(out)


def test_rank_stabilised_lora_has_its_own_scale(tmp_path):
    assert read_lora(write_adapter(tmp_path / "plain")).scale == 2.0
    assert read_lora(write_adapter(tmp_path / "rs", use_rslora=True)).scale == 4.0


@pytest.mark.parametrize(
    "key",
    [
        "model.lm_head.weight",
        "model.embed_tokens.lora_embedding_A",
        f"{NAMES[0]}.lora_B.bias",
        f"{NAMES[0]}.lora_magnitude_vector",
    ],
)
def test_a_tensor_that_is_no_factor_is_refused_by_name(tmp_path, key):
    adapter = write_adapter(tmp_path / "adapter", {PREFIX + key: torch.ones(2, 2)})
    with pytest.raises(ModelError, match="expected pairs of lora_A and lora_B only"):
        read_lora(adapter)


def test_an_adapter_of_another_base_is_told_with_numbers(pair, tmp_path):
    base, _, out = pair
    deeper = SHAPES | {"model.layers.9.mlp.down_proj": (32, 96)}
    with pytest.raises(
        ModelError, match=r"model\.layers\.9\.mlp.* it is missing; it was trained on another base model"
    ):
        merge_shards(base, read_lora(write_adapter(tmp_path / "deeper", shapes=deeper)), out)
    wider = SHAPES | {NAMES[0]: (64, 32)}
    with pytest.raises(ModelError, match=r"as \(64, 32\), but in .* it is \(48, 32\)"):
        merge_shards(base, read_lora(write_adapter(tmp_path / "wider", shapes=wider)), out)
    assert list(out.iterdir()) == []


def test_quantised_weights_are_never_merged_into(tmp_path):
    base = write_base(tmp_path / "base")
    file = base / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    tensors[f"{NAMES[0]}.weight"] = torch.zeros(768, 1, dtype=torch.uint8)
    save_file(tensors, file)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"stored as U8 .*name the model in 16 bit in export\.base"):
        merge_shards(base, read_lora(write_adapter(tmp_path / "adapter")), tmp_path / "out")


def test_a_weight_that_is_not_finite_is_named_wherever_it_comes_from(pair, tmp_path):
    base, _, out = pair
    with pytest.raises(ModelError, match=r"q_proj\.weight is not finite once the adapter is added"):
        broken = write_adapter(tmp_path / "nan", {f"{PREFIX}{NAMES[0]}.lora_B.weight": torch.full((48, 4), math.nan)})
        merge_shards(base, read_lora(broken), out)
    for folder in ("half", "inf"):
        (tmp_path / folder).mkdir()
    half = write_base(tmp_path / "half-base", torch.float16)
    with pytest.raises(ModelError, match="is not finite once the adapter is added"):  # 70,000 is beyond float16
        huge = write_adapter(tmp_path / "huge", {f"{PREFIX}{NAMES[0]}.lora_B.weight": torch.full((48, 4), 1e5)})
        merge_shards(half, read_lora(huge), tmp_path / "half")
    infinite = write_base(tmp_path / "inf-base", spoilt=torch.tensor([1.0, math.inf]))
    with pytest.raises(ModelError, match="spoilt is not finite in the base model"):
        merge_shards(infinite, read_lora(write_adapter(tmp_path / "fine")), tmp_path / "inf")


def test_one_shard_is_in_memory_and_no_more(tmp_path):
    """Three shards of 128 MiB: peft's merge would hold them all, and a shard that stays mapped counts twice."""
    base, rows, columns = tmp_path / "base", 2048, 4096
    base.mkdir()
    weight_map, size = {}, 2 * rows * columns
    for number in range(3):
        names = [f"model.layers.{8 * number + i}.mlp.down_proj.weight" for i in range(8)]
        header = {
            name: {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [i * size, (i + 1) * size]}
            for i, name in enumerate(names)
        }
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with (base / f"model-{number}.safetensors").open("wb") as stream:  # zeros that take no room on the disk
            stream.write(struct.pack("<Q", len(head)) + head)
            stream.truncate(8 + len(head) + len(names) * size)
        weight_map |= dict.fromkeys(names, f"model-{number}.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "out").mkdir()
    code = f"""
import resource, torch
from pathlib import Path
from utils.export.merge import Lora, merge_shards

lora = Lora(1.0, {{name: (torch.zeros(16, {columns}), torch.zeros({rows}, 16)) for name in {list(weight_map)}}})
torch.ones(64, 64) @ torch.ones(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_shards(Path({str(base)!r}), lora, Path({str(tmp_path / "out")!r}))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 128 + 100  # MiB
