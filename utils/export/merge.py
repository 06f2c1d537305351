"""LoRA folded into a model's own 16-bit shards, block by block: W + scale * B @ A, in float32, rounded once.

The merged shards have the base's names, order and dtypes, so each header is copied as it is and only the targets'
bytes differ. A few blocks are in memory at a time, whatever the model's size, and the same files give the same bytes
on one machine, with however many threads.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.errors import ModelError
from utils.export.shards import BYTES, INDEX, Shard, StoredTensor, find_shards
from utils.files import parse_json
from utils.hardware import GIB, require_disk, threads
from utils.progress import Progress

BLOCK = 2**21  # weights in one piece of work: with its float32 copy some 12 MB for each thread
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_own = threading.local()
_PREFIX = "base_model.model."
# What of peft's LoraConfig does not change the sum that is merged, or is allowed for here.
_HARMLESS = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_type", "peft_version",
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "init_lora_weights", "runtime_config", "megatron_core", "qalora_group_size", "loftq_config",
    "corda_config", "eva_config", "lora_ga_config", "ensure_weight_tying",
}  # fmt: skip
# These initialisations change the base's weights too, so base + adapter is not W + B @ A with W as published.
_PLAIN_STARTS = (True, False, "gaussian")


@dataclass(frozen=True)
class Lora:
    """An adapter's factors by the base tensor that they change; `scale` is alpha/r, or alpha/sqrt(r) with rslora.

    A is (r, columns) and B is (rows, r), float32 both.
    """

    scale: float
    factors: Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Merged:
    """What a merge did: how many tensors were changed, how many bytes written, and the largest weight's absolute value."""

    tensors: int
    bytes: int
    largest_weight: float


def read_lora(folder: Path) -> Lora:
    """The adapter in `folder`; raises ModelError for whatever would be merged wrongly here."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _read_settings(folder / "adapter_config.json")
    _refuse_variants(settings)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{folder / 'adapter_model.safetensors'} is no safetensors file ({error}); run 03_lora_training again."
        ) from None
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    expected = {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
    odd = sorted(expected ^ set(tensors))
    if odd or not names:
        raise ModelError(
            f"The adapter holds {odd[0] if odd else 'no LoRA factors'}, expected pairs of lora_A and lora_B only; "
            "merge it with peft's merge_and_unload."
        )
    factors = {}
    for name in sorted(names):
        a, b = (tensors[f"{name}.lora_{side}.weight"].float().contiguous() for side in "AB")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != settings["r"] or b.shape[1] != settings["r"]:
            raise ModelError(
                f"{name} has factors of {tuple(a.shape)} and {tuple(b.shape)}, and rank {settings['r']} in adapter_config.json; train it again."
            )
        factors[name.removeprefix(_PREFIX) + ".weight"] = (a, b)
    rank = math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"]
    return Lora(settings["lora_alpha"] / rank, factors)


def _read_settings(file: Path) -> dict[str, Any]:
    """adapter_config.json with what the merge reckons with: r, a whole number, and lora_alpha, a finite one."""
    try:
        settings = parse_json(file.read_text(encoding="utf-8"))
        r, alpha = settings["r"], settings["lora_alpha"]
        if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"r is {r!r} and lora_alpha {alpha!r}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"{file} holds no settings of a LoRA ({error}); run 03_lora_training again.") from None
    return settings


def _refuse_variants(settings: dict) -> None:
    from peft import LoraConfig

    plain = json.loads(json.dumps(asdict(LoraConfig()), default=str))
    found = {key: value for key, value in settings.items() if key not in _HARMLESS and value != plain.get(key)}
    if settings.get("peft_type") != "LORA":
        found = {"peft_type": settings.get("peft_type")}
    elif settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        found["init_lora_weights"] = settings["init_lora_weights"]
    found = {key: value for key, value in found.items() if value not in (None, False, {}, [])}
    if found:
        key, value = next(iter(found.items()))
        raise ModelError(
            f"The adapter has {key}={value!r}, which this merge would get wrong; merge it with peft's merge_and_unload."
        )


def merge_shards(base: Path, lora: Lora, target: Path, workers: int | None = None) -> Merged:
    """Write the shards of `base` with `lora` folded in, and their index, into the folder `target`.

    Raises ModelError where the adapter does not fit the base, the base is quantised, or a weight is not finite, and
    HardwareError where the disk is too small.
    """
    shards = find_shards(base)
    check_fit(lora, shards, base)
    size = sum(shard.size for shard in shards)
    require_disk(target, size / GIB + 0.05, "The merged model")
    count = sum(len(shard.tensors) for shard in shards)
    with (
        threads(1),  # blocks are the parallelism
        Progress("merging", count, "tensor") as bar,
        ThreadPoolExecutor(workers or _processors()) as pool,
    ):
        largest = max(_merge_shard(shard, lora, target, pool, bar) for shard in shards)
    if (base / INDEX).exists():
        (target / INDEX).write_bytes((base / INDEX).read_bytes())
    return Merged(len(lora.factors), size, largest)


def check_fit(lora: Lora, shards: list[Shard], base: Path) -> None:
    """Raise ModelError unless every tensor that the adapter changes is in the base, with its shape, in floats."""
    stored = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    absent = [name for name in lora.factors if name not in stored]
    if absent:
        raise ModelError(
            f"The adapter changes {len(lora.factors)} tensors, {len(absent)} of which {base} does not have "
            f"({absent[0]} first); it was trained on another base model."
        )
    for name, (a, b) in lora.factors.items():
        tensor, wanted = stored[name], (b.shape[0], a.shape[1])
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"{name} is stored as {tensor.dtype} in {base}, expected 16- or 32-bit floats: merging into quantised "
                "weights rounds twice; name the 16-bit model in export.base."
            )
        if tensor.shape != wanted:
            raise ModelError(
                f"The adapter changes {name} as {wanted}, but it is {tensor.shape} in {base}; the adapter was trained "
                "on another base model."
            )


def _merge_shard(shard: Shard, lora: Lora, target: Path, pool: ThreadPoolExecutor, bar: Progress) -> float:
    """Write one shard; returns the largest weight in it."""
    source = os.open(shard.path, os.O_RDONLY)
    output = os.open(target / shard.path.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    largest, work = 0.0, {}
    try:
        os.pwrite(output, shard.head, 0)
        os.ftruncate(output, shard.size)
        for tensor in shard.tensors:
            factors = lora.factors.get(tensor.name)
            work[tensor] = [
                pool.submit(_merge_block, source, output, tensor, rows, factors, lora.scale) for rows in blocks(tensor)
            ]
        for futures in work.values():
            largest = max([largest, *(future.result() for future in futures)])
            bar.update()
        os.fsync(output)
    finally:
        rest = [future for futures in work.values() for future in futures if not future.cancel()]
        wait(rest)  # none may write into a file number that is closed, and perhaps given to another file
        os.close(source)
        os.close(output)
    return largest


def blocks(tensor: StoredTensor, size: int | None = None) -> Iterator[slice]:
    """Slices of a tensor's rows, of some `size` (BLOCK) weights each; a number counts as one row."""
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, (size or BLOCK) // max(1, math.prod(tensor.shape[1:])))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _merge_block(source: int, output: int, tensor: StoredTensor, rows: slice, factors, scale: float) -> float:
    """Read one block, add what the adapter adds to it, write it; returns its largest weight."""
    import torch

    width = math.prod(tensor.shape[1:]) * BYTES[tensor.dtype]
    start = tensor.start + rows.start * width
    data, sums = _buffers((rows.stop - rows.start) * width)
    _read(source, data, start, tensor.name)
    largest = 0.0
    if tensor.dtype in _DTYPES and data:
        dtype = getattr(torch, _DTYPES[tensor.dtype])
        weights = torch.frombuffer(data, dtype=dtype)
        if factors is not None:
            a, b = factors
            sums = sums[: len(weights)].copy_(weights).view(-1, a.shape[1])
            weights.copy_(sums.addmm_(b[rows], a, alpha=scale).view(-1))
        low, high = (float(value) for value in torch.aminmax(weights))  # NaN comes through
        largest = max(abs(low), abs(high))
        if not math.isfinite(low + high):
            raise ModelError(
                f"{tensor.name} is not finite {'once the adapter is added' if factors else 'in the base model'}; "
                + ("train again with a lower learning rate." if factors else "fetch the base model again.")
            )
    _write(output, data, start)
    return largest


def _buffers(size: int):
    """This thread's own memory, used again for every block: `size` bytes, and a float32 for every two."""
    import torch

    if getattr(_own, "size", 0) < size:
        _own.size, _own.data, _own.sums = size, bytearray(size), torch.empty(size // 2, dtype=torch.float32)
    return memoryview(_own.data)[:size], _own.sums


def _read(source: int, view: memoryview, start: int, name: str) -> None:
    while view:
        count = os.preadv(source, [view], start)
        if count == 0:
            raise ModelError(f"{name} ends early: the shard became shorter while it was read; fetch it again.")
        view, start = view[count:], start + count


def _write(output: int, view: memoryview, start: int) -> None:
    while view:
        count = os.pwrite(output, view, start)
        view, start = view[count:], start + count


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
