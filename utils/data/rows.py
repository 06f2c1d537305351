"""Rows: read, checked, and written once they are split.

A row has Question, Complex_CoT and Response. Beside them it may carry `answer` and `choices` (where an answer can be
checked by rule, as in the demo) and `group` (rows that are not independent of each other share one).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from utils.data.near_duplicates import normalise
from utils.errors import DataError, HardwareError
from utils.files import atomic, is_there, parse_json, write_json, write_text
from utils.schema import EMBEDDED, Config, DataSection

COLUMNS = ("Question", "Complex_CoT", "Response")
_READERS = {
    ".jsonl": lambda path: pd.DataFrame(_read_jsonl(path)),
    ".json": lambda path: pd.DataFrame(_read_json(path)),
    ".csv": lambda path: pd.DataFrame(_read_csv(path)),
    ".parquet": lambda path: _read_parquet(path),
}


def read_table(path: Path, setting: str = "data.path", columns: tuple[str, ...] = COLUMNS) -> pd.DataFrame:
    """A local JSONL, JSON, CSV or Parquet file as it stands; `setting` and `columns` are for the messages.

    Raises DataError where it is missing, empty, of another kind, or not what its name says, HardwareError where it does
    not fit into memory.
    """
    if not is_there(path) or not path.is_file():
        raise DataError(f"There is no data file {path}; check {setting}, or leave it out for the profile's own data.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} ends in {path.suffix or 'nothing'}; expected one of {', '.join(_READERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty; expected rows with {', '.join(columns)}.")
    try:
        frame = reader(path)
    except MemoryError:  # also what a Parquet file asks for whose sizes are damaged
        size = path.stat().st_size / 1e6
        raise HardwareError(
            f"{path.name} does not fit into memory ({size:.1f} MB on disk); give fewer rows or more memory, or, where it "
            "is small, another copy of it."
        ) from None
    except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path.name} is not {path.suffix.lstrip('.').upper()}: {reason}. Mend or rename it.") from None
    if len(frame) == 0:
        raise DataError(f"{path.name} holds no rows; expected rows with {', '.join(columns)}.")
    return frame


def check_rows(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """The frame with string cells stripped and an `id` from the question's text.

    Raises DataError where a column is missing, or a cell is empty or not a string (with the first such row).
    """
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise DataError(
            f"{source} lacks the column(s) {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}."
        )
    frame = frame.reset_index(drop=True).copy()
    for column in COLUMNS:
        for index, cell in enumerate(frame[column]):
            if not isinstance(cell, str) or not cell.strip():
                what = "is empty" if _is_blank(cell) else f"holds a {type(cell).__name__}"
                raise DataError(f"{source}, row {index + 1}: {column} {what}; every row needs text there.")
            if any("\ud800" <= character <= "\udfff" for character in cell):
                raise DataError(
                    f"{source}, row {index + 1}: {column} holds half of a character; save the file as UTF-8."
                )
        frame[column] = frame[column].str.strip()
    if "group" in frame.columns:
        frame["group"] = [None if _is_blank(group) else str(group) for group in frame["group"]]
    frame["id"] = [hashlib.sha256(normalise(question).encode()).hexdigest()[:12] for question in frame["Question"]]
    return frame


def load_rows(config: DataSection) -> tuple[pd.DataFrame, list[dict]]:
    """(checked rows of a local file or a Hub data set with their place in it as `row`, entries of those dropped).

    A blank cell among the Hub's rows, which nobody here can mend, costs that row; in a local file it is an error.
    Raises DataError, also where the Hub cannot be reached.
    """
    if config.path is not None:
        rows = check_rows(read_table(config.path), config.path.name)
        return rows.assign(row=range(1, len(rows) + 1)), []
    from datasets import load_dataset

    try:
        rows = load_dataset(config.name, config.subset, revision=config.revision, split="train")
    except Exception as error:  # datasets passes on whatever requests, fsspec or pyarrow raise
        raise DataError(
            f"{config.name} could not be loaded from the Hub ({type(error).__name__}: {str(error)[:120]}); "
            "check the network, or give a local file by data.path."
        ) from None
    table = rows.to_pandas()
    blank = {
        place: column
        for column in reversed(COLUMNS)
        if column in table
        for place, cell in enumerate(table[column])
        if _is_blank(cell)
    }
    dropped = [{"row": place + 1, "reason": f"{column} is empty"} for place, column in sorted(blank.items())]
    if dropped and len(dropped) == len(table):
        raise DataError(f"{config.name} has no row without an empty cell; expected text in {', '.join(COLUMNS)}.")
    kept = [place for place in range(len(table)) if place not in blank]
    return check_rows(table.iloc[kept], config.name).assign(row=[place + 1 for place in kept]), dropped


def find_commits(config: Config) -> dict[str, Any]:
    """{setting: value} that pins every Hub data set which the configuration names without a revision.

    A data set that the Hub does not answer for is left out, the others are kept. A list has no dotted keys, so evaluate.more_benchmarks is given whole.
    """
    found: dict[str, Any] = {}
    for key, section in (("data", config.data), ("evaluate.benchmark", config.evaluate.benchmark)):
        if (
            section.path is None
            and section.name != EMBEDDED
            and (commit := _find_commit(section.name, section.revision))
        ):
            found[f"{key}.revision"] = commit
    more = [section.model_dump(mode="json") for section in config.evaluate.more_benchmarks]
    for section in more:
        if section["path"] is None and (commit := _find_commit(section["name"], section["revision"])):
            section["revision"] = commit
            found["evaluate.more_benchmarks"] = more
    return found


def _find_commit(name: str | None, revision: str | None) -> str | None:
    """The commit to pin a Hub data set to; None where there is nothing to pin, or the Hub does not answer."""
    if name is None or revision is not None:
        return None
    try:
        return _head(name)
    except Exception:  # offline or unknown: loading the rows says which
        return None


def _head(name: str) -> str:
    """The commit that the Hub data set's main branch is at."""
    from huggingface_hub import dataset_info

    return dataset_info(name).sha


def write_split(
    directory: Path, train: pd.DataFrame, held_out: pd.DataFrame, benchmark: pd.DataFrame | None, report: dict
) -> None:
    """train.parquet, eval.parquet, benchmark.jsonl (empty without one), anecdote.json and split.json, each atomically.

    anecdote.json is the tutorials' example row, which is in neither part; {} where the data have no such row.
    """
    for name, frame in (("train", train), ("eval", held_out)):
        write_frame(directory / f"{name}.parquet", frame)
    items = "" if benchmark is None else benchmark.to_json(orient="records", lines=True, force_ascii=False)
    write_text(directory / "benchmark.jsonl", items)
    write_json(directory / "anecdote.json", report.get("anecdote", {}))
    write_json(directory / "split.json", report)


def read_benchmark(directory: Path) -> pd.DataFrame | None:
    """The items that `write_split` froze, or None where the run has no benchmark."""
    path = directory / "benchmark.jsonl"
    try:
        return pd.DataFrame(_read_jsonl(path)) if path.stat().st_size else None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); run 00_setup again, which writes it.") from None


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """A Parquet file, written atomically."""
    with atomic(path) as scratch:
        frame.to_parquet(scratch, index=False)


def _is_blank(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and cell != cell)


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)  # or a folder named a=b would be a column
        table.validate(full=True)  # pandas would find text that is no UTF-8 only when it is used
        return table.to_pandas()
    except MemoryError:
        raise
    except Exception as error:  # pyarrow has a type for each kind of damage
        raise ValueError(str(error) or type(error).__name__) from None


def _read_json(path: Path) -> list[dict]:
    rows = parse_json(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, one for each row")
    return rows


def _read_csv(path: Path) -> list[dict]:
    """Cells as they are written: pandas would read "None" as missing and shift a row with one cell too many."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(2**31 - 1)
        lines = csv.reader(stream, strict=True)
        rows = []
        try:
            header = next(lines, [])
            if len(set(header)) < len(header):
                name, times = Counter(header).most_common(1)[0]
                raise ValueError(f"the column {name} occurs {times} times")
            for cells in lines:
                if cells and len(cells) != len(header):
                    raise ValueError(f"line {lines.line_num} has {len(cells)} cells, the header {len(header)}")
                rows += [dict(zip(header, cells, strict=True))] if cells else []
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}") from None
    return rows


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                row = parse_json(line)
            except json.JSONDecodeError:
                raise ValueError(f"line {number} is no JSON object") from None
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            rows.append(row)
    return rows
