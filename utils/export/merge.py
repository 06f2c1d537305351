"""LoRA folded into a model's own 16-bit shards, one shard in memory: W + scale * B @ A, in float32, rounded once."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.errors import ModelError
from utils.files import is_there, parse_json, read_json
from utils.progress import track

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Lora:
    """An adapter's factors A (r, columns) and B (rows, r) by base tensor, in float32, and alpha/r or alpha/√r."""

    scale: float
    factors: Mapping[str, tuple[Any, Any]]


def read_lora(folder: Path) -> Lora:
    """The adapter in `folder`; raises ModelError for one that holds more than pairs of factors."""
    settings = read_json(folder / "adapter_config.json")
    tensors = load_file(folder / "adapter_model.safetensors")
    names = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    odd = sorted({f"{name}.lora_{side}.weight" for name in names for side in "AB"} ^ set(tensors))
    if odd or not names:
        found = odd[0] if odd else "no LoRA factors"
        raise ModelError(f"The adapter holds {found}, expected pairs of lora_A and lora_B only; merge it with peft.")
    factors, r = {}, settings["r"]
    for name in names:
        a, b = (tensors[f"{name}.lora_{side}.weight"].float().contiguous() for side in "AB")
        factors[f"{name.removeprefix('base_model.model.')}.weight"] = (a, b)
    return Lora(settings["lora_alpha"] / (math.sqrt(r) if settings.get("use_rslora") else r), factors)


def find_shards(folder: Path, complete: bool = True) -> list[Path]:
    """The model's safetensors files by name: those of its index, or the single one.

    Raises ModelError where one of them is not there, unless `complete` is False.
    """
    index, names = folder / INDEX, [SINGLE]
    if index.exists():
        try:
            names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
            if not names or any(not name or Path(name).name != name for name in names):
                raise ValueError("its weight_map does not name files beside it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of shards ({error}); fetch the base model again.") from None
    missing = [name for name in names if complete and not is_there(folder / name)]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} shards ({missing[0]}); fetch the model again.")
    return [folder / name for name in names]


def list_tensors(shards: Sequence[Path]) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """{tensor: (shard, dtype such as bfloat16, shape)}; raises ModelError for a file that is cut short or none."""
    found = {}
    for path in shards:
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  (no mapping)
                    part = shard.get_slice(name)
                    dtype = part.get_dtype()
                    found[name] = (path, _DTYPES.get(dtype, dtype), tuple(part.get_shape()))
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} is no whole safetensors file ({error}); fetch it again.") from None
    return found


def merge_shards(base: Path, lora: Lora, target: Path, fetch: Callable[[list[str]], object] | None = None) -> None:
    """Write the shards of `base` with `lora` folded in, and their index; raises ModelError where they don't fit.

    `fetch` brings a shard into `base` that is not there yet; it is deleted before the next one comes.
    """
    shards, left = find_shards(base, complete=fetch is None), dict(lora.factors)
    if fetch is None:  # all of it before anything is written
        _check_fit(left, list_tensors(shards), base)
    for number, path in enumerate(shards, 1):
        if fetch:
            fetch([path.name])
        tensors = list_tensors([path])
        _check_fit({name: left.pop(name) for name in tensors if name in left}, tensors, base)
        names = track(tensors, f"merging shard {number} of {len(shards)}", unit="tensor")
        merged = {name: _merge_tensor(path, name, lora) for name in names}
        save_file(merged, target / path.name, metadata={"format": "pt"})
        del merged  # before the next shard is read
        if fetch:
            path.unlink()
    _check_fit(left, {}, base)
    if (base / INDEX).exists():
        shutil.copyfile(base / INDEX, target / INDEX)


def _check_fit(factors: Mapping[str, tuple[Any, Any]], tensors: Mapping[str, tuple], base: Path) -> None:
    """Raise ModelError unless every tensor that the factors change is in the base, with its shape, in floats."""
    for name, (a, b) in factors.items():
        _, dtype, shape = tensors.get(name, (None, "bfloat16", None))
        if dtype not in _DTYPES.values():
            raise ModelError(f"{name} is stored as {dtype} in {base}; name the model in 16 bit in export.base.")
        if shape != (changed := (b.shape[0], a.shape[1])):
            found = f"The adapter changes {name} as {changed}, but in {base} it is {shape or 'missing'}"
            raise ModelError(f"{found}; it was trained on another base model.")


def _merge_tensor(path: Path, name: str, lora: Lora):
    with safe_open(path, framework="pt") as shard:  # mapped anew: pages that other tensors touched would stay
        tensor, changed = shard.get_tensor(name), name in lora.factors
    if changed:
        a, b = lora.factors[name]
        tensor = tensor.to(torch.float32, copy=True).addmm_(b, a, alpha=lora.scale).to(tensor.dtype)
    if not torch.isfinite(tensor).all():
        ours = "once the adapter is added; train again with a lower learning rate."
        theirs = "in the base model; fetch the base model again."
        raise ModelError(f"{name} is not finite {ours if changed else theirs}")
    return tensor
