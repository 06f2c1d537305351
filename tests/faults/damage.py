"""Five ways to damage a file, and what a run directory's files are to a stage."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

KINDS = ("truncated", "emptied", "bit-flipped", "deleted", "of another run")
# What no stage has on record. Nothing reads these to go on from, except where it is said how a damaged one is found.
UNRECORDED = {
    "manifest.json": "sealed; refused by whatever opens the run directory",
    "state.json": "sealed; a damaged one counts as none, and the next run writes it",
    "config.yaml": "never read back; written by every run",
    "report/": "never read back, but for the executed notebooks, of which a damaged one is left out; written anew after each stage",
    "training/checkpoints/": "one whose trainer_state.json is not whole is passed over, and the one before it resumed",
    "training/launch.log": "never read back",
    "tracking/": "never read back; `publish` hands it to wandb, which says what it cannot read",
}


def damage(path: Path, kind: str) -> None:
    """Damage one file in place, its size and time kept where the kind allows it."""
    data, stat = path.read_bytes(), path.stat()
    if kind == "deleted":
        path.unlink()
        return
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"\x01"
    changed = {
        "truncated": data[: len(data) * 2 // 3] if data else b"\n",
        "emptied": b"" if data else b"{}\n",
        "bit-flipped": flipped,
        "of another run": of_another_run(path) if kind == "of another run" else b"",
    }
    path.write_bytes(changed[kind])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def of_another_run(path: Path) -> bytes:
    """A valid file of the same kind with other content, as another run would have left it there."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
        return frame.iloc[::-1].reset_index(drop=True).to_parquet(index=False)
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", data[:8])
        return data[: 8 + length] + data[8 + length :][::-1]
    if path.suffix == ".jsonl" and data:
        return b"".join(reversed(data.splitlines(keepends=True))) if data.count(b"\n") > 1 else data * 2
    if path.suffix == ".json" and data:
        value = json.loads(data)
        return json.dumps({**value, "of": "another run"} if isinstance(value, dict) else [value]).encode()
    return data + b"\n"


@contextmanager
def damaged(path: Path, kind: str) -> Iterator[None]:
    """`path` damaged inside the block, and as it was after it, time included."""
    data, stat = path.read_bytes(), path.stat()
    damage(path, kind)
    try:
        yield
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
