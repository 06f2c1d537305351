"""Safetensors files as what they are: a length, a JSON header, and the tensors' bytes in a row.

The library loads by mapping a whole file, and every mapped page that was touched counts as this process's memory. The
merge reads a block, writes a block, and so holds a few megabytes of a shard of five gigabytes.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from utils.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
_LONGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `start` and `stop` are positions in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its leading bytes (length and header, as they are) and its tensors in file order."""

    path: Path
    head: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return max([len(self.head), *(tensor.stop for tensor in self.tensors)])


def read_shard(path: Path) -> Shard:
    """Parse a file's header; raises ModelError where the file is cut short or is no safetensors."""
    found = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(found, _LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            stream.seek(0)
            head = stream.read(8 + length)
        entries = {name: entry for name, entry in json.loads(head[8:]).items() if name != "__metadata__"}
        tensors = [
            StoredTensor(name, entry["dtype"], tuple(entry["shape"]), *(len(head) + at for at in entry["data_offsets"]))
            for name, entry in entries.items()
        ]
        for tensor in tensors:
            if tensor.stop - tensor.start != BYTES[tensor.dtype] * math.prod(tensor.shape):
                raise ValueError(f"{tensor.name} does not have the size of its shape")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} is no safetensors file ({error}); fetch it again.") from None
    shard = Shard(path, head, tuple(sorted(tensors, key=lambda tensor: tensor.start)))
    if found != shard.size:
        raise ModelError(f"{path} holds {found:,} bytes and its header promises {shard.size:,}; fetch it again.")
    return shard


def find_shards(folder: Path) -> list[Shard]:
    """The model's shards in `folder`, by name: those of its index, or the single file.

    Raises ModelError where the folder has neither, or a shard of the index is missing or cut short.
    """
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (folder / SINGLE).exists():
        names = [SINGLE]
    else:
        raise ModelError(f"{folder} holds neither {INDEX} nor {SINGLE}; expected the base model's weights.")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} shards, {missing[0]} first; fetch the base model again."
        )
    return [read_shard(folder / name) for name in names]
