"""Safetensors files as what they are: a length, a JSON header, and the tensors' bytes in a row.

The library loads by mapping a whole file, and every mapped page that was touched counts as this process's memory. The
merge reads a block, writes a block, and so holds a few megabytes of a shard of five gigabytes.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from utils.errors import ModelError
from utils.files import is_there, parse_json

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
    try:
        found = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(found, _LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            stream.seek(0)
            head = stream.read(8 + length)
        entries = {name: entry for name, entry in parse_json(head[8:]).items() if name != "__metadata__"}
        tensors = [
            StoredTensor(name, entry["dtype"], tuple(entry["shape"]), *(len(head) + at for at in entry["data_offsets"]))
            for name, entry in entries.items()
        ]
        for tensor in tensors:
            if not all(type(number) is int and number >= 0 for number in (tensor.start, tensor.stop, *tensor.shape)):
                raise ValueError(f"{tensor.name} has a shape or a place that is none")
            if tensor.stop - tensor.start != BYTES[tensor.dtype] * math.prod(tensor.shape):
                raise ValueError(f"{tensor.name} does not have the size of its shape")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise ModelError(f"{path} is no safetensors file ({error}); fetch it again.") from None
    shard = Shard(path, head, tuple(sorted(tensors, key=lambda tensor: tensor.start)))
    if found != shard.size:
        raise ModelError(f"{path} holds {found:,} bytes and its header promises {shard.size:,}; fetch it again.")
    return shard


def _names_in(index: Path) -> list[str]:
    """The shards that an index names; one that lies elsewhere is refused."""
    try:
        names = set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or any(not isinstance(name, str) or not name or Path(name).name != name for name in names):
            raise ValueError("its weight_map does not name files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of shards ({error}); fetch the base model again.") from None
    return sorted(names)


def find_shards(folder: Path) -> list[Shard]:
    """The model's shards in `folder`, by name: those of its index, or the single file.

    Raises ModelError where the folder has neither, or a shard of the index is missing or cut short.
    """
    index = folder / INDEX
    if index.exists():
        names = _names_in(index)
    elif (folder / SINGLE).exists():
        names = [SINGLE]
    else:
        raise ModelError(f"{folder} holds neither {INDEX} nor {SINGLE}; expected the base model's weights.")
    missing = [name for name in names if not is_there(folder / name)]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} shards, {missing[0]} first; fetch the base model again."
        )
    return [read_shard(folder / name) for name in names]
