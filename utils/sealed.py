"""JSON that says itself whether it is whole: a value carries a digest of all its others.

For what is gone on with before its stage is done, when the manifest does not know it yet: saved answers, a fit, a
checkpoint's files. A bit that turned over in a number or a text leaves JSON that parses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.files import parse_json, write_json

SEAL = "seal"


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with their digest under "seal", in place of an earlier one."""
    rest = unsealed(values)
    text = json.dumps(rest, sort_keys=True)
    return {**rest, SEAL: hashlib.sha256(text.encode()).hexdigest()[:16]}


def is_whole(values: Any) -> bool:
    """Whether `values` are an object with the digest that belongs to them."""
    return isinstance(values, dict) and SEAL in values and seal(values)[SEAL] == values[SEAL]


def to_lines(rows: Iterable[dict[str, Any]]) -> str:
    """JSONL, each line sealed."""
    return "".join(json.dumps(seal(row), ensure_ascii=False) + "\n" for row in rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that are whole; none where there is no file.

    A line that a kill cut off, or that was changed, is passed over: what it held is made again.
    """
    return split_lines(path.read_bytes())[0] if path.is_file() else []


def split_lines(data: bytes) -> tuple[list[dict[str, Any]], list[bytes]]:
    """(the rows that are whole, the other lines as they are) of a JSONL file's bytes: a kill can cut a character in two."""
    rows, others = [], []
    for line in filter(None, data.split(b"\n")):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if is_whole(row):
            rows.append(unsealed(row))
        else:
            others.append(line)
    return rows, others


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """`values`, sealed, as indented JSON, written atomically."""
    write_json(path, seal(values))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote; empty where there is no such file, or it is not whole."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return unsealed(values) if is_whole(values) else {}


def open_seal(values: Any) -> Any:
    """`values` without their seal; as they are where they have none, as people and earlier versions write them.

    Raises ValueError where the seal is not theirs.
    """
    if not isinstance(values, dict) or SEAL not in values:
        return values
    if not is_whole(values):
        raise ValueError("it is not as it was written")
    return unsealed(values)


def unsealed(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without their digest."""
    return {key: value for key, value in values.items() if key != SEAL}
