"""Atomic writes and fingerprints of files: what is on disk is whole, and what it was is known."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

_READ_AGAIN = 2**30
is_there, is_folder = os.path.exists, os.path.isdir  # pathlib's raise where a folder on the way may not be read


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A scratch path beside `path` that takes its place when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def sweep_scratch(root: Path) -> None:
    """Remove what a killed process had begun to write below `root`; nobody else may be writing there."""
    for leftover in [*root.rglob(".*.tmp")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes `folder`'s place when the block ends well; until then the old one stays whole."""
    scratch, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)  # a kill came between the two renames below
    for leftover in (scratch, old):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> Path:
    """Write `text` so that a reader sees the old file or the new one, never half of either; returns `path`."""
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written atomically; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """The value that `text` holds; raises ValueError for whatever is no JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises OSError, and ValueError for whatever is no JSON."""
    return parse_json(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where there is no file. A line that a kill cut off is passed over."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with suppress(ValueError):
            rows.append(parse_json(line))
    return [row for row in rows if isinstance(row, dict)]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """`rows` as JSONL, written atomically."""
    write_text(path, _to_lines(rows))


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add `rows` to a JSONL file, on the disk when this returns; the torn line of a kill is left behind, never glued to."""
    with path.open("ab+") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(_to_lines(rows).encode())
        stream.flush()
        os.fsync(stream.fileno())


def _to_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: Any, length: int = 16) -> str:
    """The first hex digits of the sha256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def relative_name(text: str) -> PurePosixPath | None:
    """`text` as the name of something below a folder; None where it points out of it or two systems read it differently."""
    path = PurePosixPath(text)
    odd = path.as_posix() != text or not path.name or "\\" in text or not text.isprintable()
    return None if odd or path.is_absolute() or ".." in path.parts else path


def list_files(root: Path, relative: str) -> list[Path]:
    """The file `root/relative`, or every file below that folder, sorted; dot files are scratch and left out."""
    place = root / relative
    if place.is_file():
        return [place]
    return sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith("."))


def record_files(root: Path, relatives: tuple[str, ...], known: dict[str, dict] | None = None) -> dict[str, dict]:
    """{path: {sha256, bytes, mtime_ns}} of all files below `relatives`; large ones in `known` aren't read again."""
    records = {}
    for relative in relatives:
        for path in list_files(root, relative):
            if path.suffix == ".old":
                continue  # kept for people; no stage writes or reads it
            name, stat = path.relative_to(root).as_posix(), path.stat()
            record, before = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}, (known or {}).get(name, {})
            same = stat.st_size > _READ_AGAIN and before.items() >= record.items()
            records[name] = {"sha256": before["sha256"] if same else sha256(path), **record}
    return records


def digests(records: dict[str, dict]) -> dict[str, str]:
    """Only the digests of `record_files`: what two runs can be compared by."""
    return {name: record["sha256"] for name, record in records.items()}


def fingerprint(path: Path) -> str:
    """A digest of a data file's bytes, or of a model folder's own file names, sizes and small files."""
    if path.is_file():
        return sha256(path)
    entries = []
    for file in sorted(path.iterdir() if path.is_dir() else ()):
        if file.name.startswith(".") or not file.is_file():
            continue
        size = file.stat().st_size
        entries.append(f"{file.name} {size} {sha256(file) if size < 1_000_000 else ''}")
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()
