"""Rows: read, checked, and written once they are split.

A row has Question, Complex_CoT and Response. Beside them it may carry `answer` and `choices` (where an answer can be
checked by rule, as in the demo) and `group` (rows that are not independent of each other share one).
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.data.near_duplicates import normalise
from utils.errors import DataError
from utils.files import atomic, is_there, parse_json, write_json, write_text
from utils.schema import EMBEDDED, Config, DataSection

COLUMNS = ("Question", "Complex_CoT", "Response")


def read_table(path: Path, setting: str = "data.path", columns: tuple[str, ...] = COLUMNS) -> pd.DataFrame:
    """A local JSONL, JSON, CSV or Parquet file as it stands; `setting` and `columns` are for DataError's messages."""
    expected = f"expected rows with {', '.join(columns)}"
    if not is_there(path) or not path.is_file():
        raise DataError(f"There is no data file {path}; check {setting}, or leave it out for the profile's own data.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} ends in {path.suffix or 'nothing'}; expected one of {', '.join(_READERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty; {expected}.")
    try:
        frame = reader(path)
    except Exception as error:  # pyarrow and pandas have a type for each kind of damage
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path.name} is not {path.suffix.lstrip('.').upper()}: {reason}. Mend or rename it.") from None
    if len(frame) == 0:
        raise DataError(f"{path.name} holds no rows; {expected}.")
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
        for number, cell in enumerate(frame[column], start=1):
            if _is_blank(cell) or not isinstance(cell, str):
                what = "is empty" if _is_blank(cell) else f"holds a {type(cell).__name__}"
                raise DataError(f"{source}, row {number}: {column} {what}; every row needs text there.")
        frame[column] = frame[column].str.strip()
    if "group" in frame.columns:
        frame["group"] = [None if _is_blank(group) else str(group) for group in frame["group"]]
    frame["id"] = [hashlib.sha256(normalise(question).encode()).hexdigest()[:12] for question in frame["Question"]]
    return frame


def load_rows(config: DataSection) -> tuple[pd.DataFrame, list[dict]]:
    """(checked rows of a local file or a Hub data set with their place in it as `row`, entries of those dropped).

    A blank cell costs a row of the Hub's, which nobody here can mend; in a local file it is a DataError.
    """
    if config.path is not None:
        rows = check_rows(read_table(config.path), config.path.name)
        return rows.assign(row=range(1, len(rows) + 1)), []
    table = load_hub_table(config.name, config.subset, config.revision, "train", "data.path")
    blank = table.reindex(columns=COLUMNS, fill_value="text").map(_is_blank)
    lost = blank.any(axis=1).to_numpy()
    dropped = [{"row": int(i) + 1, "reason": f"{blank.iloc[i].idxmax()} is empty"} for i in np.flatnonzero(lost)]
    if lost.all():
        raise DataError(f"{config.name} has no row without an empty cell; expected text in {', '.join(COLUMNS)}.")
    return check_rows(table[~lost], config.name).assign(row=np.flatnonzero(~lost) + 1), dropped


def load_hub_table(name: str, subset: str | None, revision: str | None, split: str, setting: str) -> pd.DataFrame:
    """A split of a Hub data set as it stands; raises DataError, which names `setting` as the way out."""
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, revision=revision, split=split).to_pandas()
    except Exception as error:  # datasets passes on whatever requests, fsspec or pyarrow raise
        raise DataError(
            f"{name} could not be loaded from the Hub ({type(error).__name__}: {str(error)[:120]}); check the network, "
            f"or give a local file by {setting}."
        ) from None


def find_commits(config: Config) -> dict[str, Any]:
    """{setting: value} that pins every Hub data set which the configuration names without a revision.

    A data set that the Hub does not answer for is left out. A list has no dotted keys, so more_benchmarks is given whole.
    """
    sections = {"data.revision": config.data, "evaluate.benchmark.revision": config.evaluate.benchmark}
    found: dict[str, Any] = {key: commit for key, one in sections.items() if (commit := _find_commit(one))}
    more = config.evaluate.more_benchmarks
    commits = [_find_commit(section) for section in more]
    if any(commits):
        found["evaluate.more_benchmarks"] = [
            section.model_dump(mode="json") | {"revision": commit or section.revision}
            for section, commit in zip(more, commits, strict=True)
        ]
    return found


def _find_commit(section: Any) -> str | None:
    """The commit that a Hub data set's main branch is at; None where nothing is to be pinned, or the Hub does not answer."""
    if section.path is not None or section.revision is not None or section.name in (None, EMBEDDED):
        return None
    from huggingface_hub import dataset_info

    try:
        return dataset_info(section.name).sha
    except Exception:  # offline or unknown: loading the rows says which
        return None


def write_split(directory: Path, parts: dict[str, pd.DataFrame], benchmark: pd.DataFrame | None, report: dict) -> None:
    """{name}.parquet of each part, benchmark.jsonl (empty without one), anecdote.json and split.json, each atomically.

    A part without rows leaves no file. anecdote.json is the tutorials' example row, which is in no part; {} where the data
    have no such row.
    """
    for name, frame in parts.items():
        write_frame(directory / f"{name}.parquet", frame)
    items = "" if benchmark is None else benchmark.to_json(orient="records", lines=True, force_ascii=False)
    write_text(directory / "benchmark.jsonl", items)
    write_json(directory / "anecdote.json", report.get("tutorial_question", {}))
    write_json(directory / "split.json", report)


def read_benchmark(directory: Path) -> pd.DataFrame | None:
    """The items that `write_split` froze, or None where the run has no benchmark."""
    path = directory / "benchmark.jsonl"
    try:
        return _read_jsonl(path) if path.stat().st_size else None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); run 00_setup again, which writes it.") from None


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """A Parquet file, written atomically; none where the frame has no rows."""
    if not len(frame):
        path.unlink(missing_ok=True)
        return
    with atomic(path) as scratch:
        frame.to_parquet(scratch, index=False)


def _is_blank(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and cell != cell)


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, partitioning=None)  # or a folder named a=b would be a column
    table.validate(full=True)  # pandas would find text that is no UTF-8 only when it is used
    return table.to_pandas()


def _read_json(path: Path) -> pd.DataFrame:
    """A list of objects, or one object of them by their id, as PubMedQA's own file is."""
    rows = parse_json(path.read_text(encoding="utf-8-sig"))
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = [{"id": name, **row} for name, row in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, one for each row")
    return pd.DataFrame(rows)


def _read_csv(path: Path) -> pd.DataFrame:
    """Cells as they are written, "None" and "007" too; a row with a cell too many is an error and moves no column."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON object") from error
        if row is not None and not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        rows += [] if row is None else [row]
    return pd.DataFrame(rows)


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
