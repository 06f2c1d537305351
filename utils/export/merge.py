"""LoRA folded into a model's own 16-bit shards, one shard in memory: W + scale * B @ A, in float32, rounded once."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import ModelError
from utils.files import is_there, parse_json
from utils.hardware import GIB, require_disk
from utils.progress import Progress

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PREFIX = "base_model.model."
# Settings of peft's that change the sum. What they leave out is found again when the merged model is loaded back.
_UNKNOWN_HERE = (
    "use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication",
    "trainable_token_indices", "bias",
)  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """An adapter's factors by the base tensor that they change; `scale` is alpha/r, or alpha/sqrt(r) with rslora.

    A is (r, columns) and B is (rows, r), float32 both.
    """

    scale: float
    factors: Mapping[str, tuple[Any, Any]]


def read_lora(folder: Path) -> Lora:
    """The adapter in `folder`; raises ModelError for whatever would be merged wrongly here."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings, file = _read_settings(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is no safetensors file ({error}); run 03_lora_training again.") from None
    names = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    odd = sorted({f"{name}.lora_{side}.weight" for name in names for side in "AB"} ^ set(tensors))
    if odd or not names:
        raise ModelError(
            f"The adapter holds {odd[0] if odd else 'no LoRA factors'}, expected pairs of lora_A and lora_B only; "
            "merge it with peft's merge_and_unload."
        )
    factors, r = {}, settings["r"]
    for name in names:
        a, b = (tensors[f"{name}.lora_{side}.weight"].float().contiguous() for side in "AB")
        if a.shape[:1] != (r,) or b.shape[1:] != (r,):
            raise ModelError(f"{name} does not have the rank {r} of adapter_config.json; train it again.")
        factors[name.removeprefix(_PREFIX) + ".weight"] = (a, b)
    return Lora(settings["lora_alpha"] / (math.sqrt(r) if settings.get("use_rslora") else r), factors)


def _read_settings(file: Path) -> dict[str, Any]:
    """adapter_config.json, where it is that of a LoRA that this merge gets right; raises ModelError elsewhere."""
    try:
        settings = parse_json(file.read_text(encoding="utf-8"))
        r, alpha = settings["r"], settings["lora_alpha"]
        if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"r is {r!r} and lora_alpha {alpha!r}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"{file} holds no settings of a LoRA ({error}); run 03_lora_training again.") from None
    odd = {key: settings[key] for key in _UNKNOWN_HERE if settings.get(key) not in (None, False, {}, [], "none")}
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):  # others change the base's weights too
        odd["init_lora_weights"] = settings["init_lora_weights"]
    for key, value in odd.items():
        raise ModelError(
            f"The adapter has {key}={value!r}, which this merge would get wrong; merge it with peft's merge_and_unload."
        )
    return settings


def find_shards(folder: Path) -> list[Path]:
    """The model's safetensors files by name: those of its index, or the single one; raises ModelError without them."""
    index = folder / INDEX
    if not index.exists():
        names = [SINGLE]
    else:
        try:
            names = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not names or any(not name or Path(name).name != name for name in names):
                raise ValueError("its weight_map does not name files beside it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of shards ({error}); fetch the base model again.") from None
    missing = [name for name in names if not is_there(folder / name)]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} shards, {missing[0]} first; fetch the model again."
        )
    return [folder / name for name in names]


def list_tensors(shards: Sequence[Path]) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """{tensor: (shard, dtype such as bfloat16, shape)}; raises ModelError for a file that is cut short or none."""
    from safetensors import SafetensorError, safe_open

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


def read_tensor(path: Path, name: str):
    """One tensor of a shard. The file is mapped for it alone: pages that other tensors touched would stay in memory."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as shard:
        return shard.get_tensor(name)


def merge_shards(base: Path, lora: Lora, target: Path) -> None:
    """Write the shards of `base` with `lora` folded in, and their index, into `target`.

    Raises ModelError where the adapter does not fit the base, the base is quantised, or a weight is not finite, and
    HardwareError where the disk is too small.
    """
    shards = find_shards(base)
    tensors = list_tensors(shards)
    check_fit(lora, tensors, base)
    require_disk(target, sum(path.stat().st_size for path in shards) / GIB + 0.05, "The merged model")
    with Progress("merging", len(tensors), "tensor") as bar:
        for path in shards:
            _merge_shard(path, [name for name, (place, _, _) in tensors.items() if place == path], lora, target, bar)
    if (base / INDEX).exists():
        shutil.copyfile(base / INDEX, target / INDEX)


def check_fit(lora: Lora, tensors: Mapping[str, tuple[Path, str, tuple[int, ...]]], base: Path) -> None:
    """Raise ModelError unless every tensor that the adapter changes is in the base, with its shape, in floats."""
    absent = [name for name in lora.factors if name not in tensors]
    if absent:
        raise ModelError(
            f"The adapter changes {len(lora.factors)} tensors, {len(absent)} of which {base} does not have "
            f"({absent[0]} first); it was trained on another base model."
        )
    for name, (a, b) in lora.factors.items():
        _, dtype, shape = tensors[name]
        if dtype not in _DTYPES.values():
            raise ModelError(
                f"{name} is stored as {dtype} in {base}, expected 16- or 32-bit floats: merging into quantised weights "
                "rounds twice; name the 16-bit model in export.base."
            )
        if shape != (b.shape[0], a.shape[1]):
            raise ModelError(
                f"The adapter changes {name} as {(b.shape[0], a.shape[1])}, but it is {shape} in {base}; the adapter "
                "was trained on another base model."
            )


def _merge_shard(path: Path, names: Sequence[str], lora: Lora, target: Path, bar: Progress) -> None:
    """Write one shard under its own name."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    merged = {}
    for name in names:
        tensor = read_tensor(path, name)
        if name in lora.factors:
            a, b = lora.factors[name]
            tensor = tensor.to(torch.float32, copy=True).addmm_(b, a, alpha=lora.scale).to(tensor.dtype)
        if not torch.isfinite(tensor).all():
            ours = "once the adapter is added; train again with a lower learning rate."
            theirs = "in the base model; fetch the base model again."
            raise ModelError(f"{name} is not finite {ours if name in lora.factors else theirs}")
        merged[name] = tensor
        bar.update()
    try:
        save_file(merged, target / path.name, metadata={"format": "pt"})
    except SafetensorError as error:  # the library tells a refusing disk in words: "No space left … (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
