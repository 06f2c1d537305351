"""Rows: read, checked, and split once and for all before any model is loaded.

A row has Question, Complex_CoT and Response. Beside them it may carry `answer` and `choices` (where an answer can be
checked by rule, as in the demo) and `group` (rows that are not independent of each other share one).
"""

from __future__ import annotations

import csv
import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd

from utils import demo_data
from utils.errors import DataError
from utils.files import atomic, write_json, write_text
from utils.settings import EMBEDDED, BenchmarkSection, Config, DataSection

COLUMNS = ("Question", "Complex_CoT", "Response")
_ITEM_COLUMNS = ("question", "options", "answer_idx")  # MedQA's names
_READERS = {
    ".jsonl": lambda path: pd.DataFrame(_read_jsonl(path)),
    ".json": lambda path: pd.DataFrame(_read_json(path)),
    ".csv": lambda path: pd.DataFrame(_read_csv(path)),
    ".parquet": pd.read_parquet,
}


def read_table(path: Path, setting: str = "data.path", columns: tuple[str, ...] = COLUMNS) -> pd.DataFrame:
    """A local JSONL, JSON, CSV or Parquet file as it stands; `setting` and `columns` are for the messages.

    Raises DataError where it is missing, empty, of another kind, or not what its name says.
    """
    if not path.is_file():
        raise DataError(f"There is no data file {path}; check {setting}, or leave it out for the profile's own data.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} ends in {path.suffix or 'nothing'}; expected one of {', '.join(_READERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty; expected rows with {', '.join(columns)}.")
    try:
        frame = reader(path)
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
        frame[column] = frame[column].str.strip()
    if "group" in frame.columns:
        frame["group"] = [None if _is_blank(group) else str(group) for group in frame["group"]]
    frame["id"] = [hashlib.sha256(normalise(question).encode()).hexdigest()[:12] for question in frame["Question"]]
    return frame


def normalise(text: str) -> str:
    """Case, width and spacing folded: two questions that differ in these only are one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def load_rows(config: DataSection) -> pd.DataFrame:
    """All rows of a local file or a Hub data set, checked.

    Raises DataError, also where the Hub cannot be reached.
    """
    if config.path is not None:
        return check_rows(read_table(config.path), config.path.name)
    from datasets import load_dataset

    try:
        rows = load_dataset(config.name, config.subset, revision=config.revision, split="train")
    except Exception as error:  # datasets passes on whatever requests, fsspec or pyarrow raise
        raise DataError(
            f"{config.name} could not be loaded from the Hub ({type(error).__name__}: {str(error)[:120]}); "
            "check the network, or give a local file by data.path."
        ) from None
    return check_rows(rows.to_pandas(), config.name)


def find_commits(config: Config) -> dict[str, str]:
    """{setting: commit} for every Hub data set that the configuration names without a revision; empty if out of reach."""
    from huggingface_hub import dataset_info

    found = {}
    for key, section in (("data", config.data), ("evaluate.benchmark", config.evaluate.benchmark)):
        if section.path is None and section.revision is None and section.name not in (None, EMBEDDED):
            try:
                found[f"{key}.revision"] = dataset_info(section.name).sha
            except Exception:  # offline or unknown: loading the rows says which
                return {}
    return found


def split_rows(config: Config) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """(train, held-out, report): disjoint by question, exact duplicates dropped, fixed by data.seed.

    The report names every dropped row and holds the digests of both parts. Raises DataError where more held-out
    rows are asked for than there are.
    """
    data = config.data
    if config.embedded_data:
        train = pd.DataFrame(demo_data.tuning_rows("train", data.train_rows or 960))
        held_out = pd.DataFrame(demo_data.tuning_rows("test"))
        _require_rows(data.eval_rows, len(held_out), spare=0)
        train, held_out = check_rows(train, "demo data"), check_rows(held_out, "demo data").head(data.eval_rows)
        dropped: list[dict] = []
    else:
        rows = load_rows(data)
        duplicate = rows["id"].duplicated()
        dropped = [{"id": i, "reason": "same question as an earlier row"} for i in rows.loc[duplicate, "id"]]
        rows = rows[~duplicate].reset_index(drop=True)
        train, held_out = _divide(rows, data)
    report = {
        "source": "embedded synthetic data" if config.embedded_data else str(data.path or data.name),
        "revision": data.revision,
        "seed": data.seed,
        "train_rows": len(train),
        "train_rows_asked_for": data.train_rows,
        "eval_rows": len(held_out),
        "train_sha256": ids_digest(train),
        "eval_sha256": ids_digest(held_out),
        "dropped": dropped,
    }
    return train.reset_index(drop=True), held_out.reset_index(drop=True), report


def _divide(rows: pd.DataFrame, data: DataSection) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw the held-out rows by seed; unshuffled training rows are the first of the file and stay in training."""
    rng = np.random.default_rng(data.seed)
    if data.shuffle:
        _require_rows(data.eval_rows, len(rows), spare=1)
        order = rng.permutation(len(rows))
        held_out, rest = order[: data.eval_rows], order[data.eval_rows :]
        if "group" in rows.columns:  # rows that share a group with a held-out one would give it away
            given_away = set(rows["group"].iloc[held_out].dropna())
            rest = [i for i in rest if rows["group"].iloc[i] not in given_away]
        return rows.iloc[rest[: data.train_rows]], rows.iloc[held_out]
    first = data.train_rows or len(rows) - data.eval_rows
    if data.train_rows and data.train_rows >= len(rows):
        raise DataError(
            f"data.train_rows asks for the first {data.train_rows} rows, but there are only {len(rows)} and some must be "
            "held out; lower data.train_rows, or give more data."
        )
    _require_rows(data.eval_rows, len(rows) - max(first, 1), spare=0)
    held_out = first + rng.permutation(len(rows) - first)[: data.eval_rows]
    return rows.iloc[:first], rows.iloc[held_out]


def _require_rows(asked: int, found: int, spare: int) -> None:
    if asked > found - spare:
        raise DataError(
            f"data.eval_rows asks for {asked} held-out rows, but only {max(found - spare, 0)} can be held out; "
            "lower it, or give more data."
        )


def load_benchmark(config: BenchmarkSection, seed: int) -> pd.DataFrame:
    """`config.rows` of `load_items`, drawn by seed; raises DataError where more are asked for than there are."""
    items = load_items(config)
    if config.rows > len(items):
        source = config.name if config.path is None else config.path.name
        raise DataError(f"evaluate.benchmark.rows asks for {config.rows} items; {source} has {len(items)}.")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(items))[: config.rows])
    return items.iloc[chosen].reset_index(drop=True)


def load_items(config: BenchmarkSection) -> pd.DataFrame:
    """All multiple-choice items as id, question, options (dict of letter to text) and gold.

    Reads the schema of MedQA with four options: question, options, answer_idx. Raises DataError for another schema,
    a gold letter that is not among the options, or duplicate ids.
    """
    if config.path is not None:
        frame, source = read_table(config.path, "evaluate.benchmark.path", _ITEM_COLUMNS), config.path.name
    else:
        from datasets import load_dataset

        source = str(config.name)
        try:
            frame = load_dataset(config.name, revision=config.revision, split=config.split).to_pandas()
        except Exception as error:  # see load_rows
            raise DataError(
                f"The benchmark {source} could not be loaded from the Hub ({type(error).__name__}); check the network, "
                "or give a local file by evaluate.benchmark.path."
            ) from None
    missing = [column for column in _ITEM_COLUMNS if column not in frame.columns]
    if missing:
        raise DataError(f"{source} lacks {', '.join(missing)}; expected question, options and answer_idx (MedQA).")
    ids = frame["id"].astype(str) if "id" in frame.columns else [f"{config.split}-{i}" for i in range(len(frame))]
    items = pd.DataFrame({"id": ids, "question": frame["question"], "options": frame["options"]})
    items["gold"] = frame["answer_idx"]
    for row in items.itertuples():
        options = row.options
        if isinstance(options, dict):  # a Hub struct holds None where an item has no such option
            options = items.at[row.Index, "options"] = {key: text for key, text in options.items() if text}
        if not isinstance(row.question, str) or not row.question.strip():
            raise DataError(f"{source}, item {row.id}: the question is empty.")
        if not isinstance(options, dict) or len(options) < 2 or not all(len(key) == 1 for key in options):
            raise DataError(f"{source}, item {row.id}: options must map at least two letters to texts.")
        if row.gold not in options:
            raise DataError(
                f"{source}, item {row.id}: the right letter {row.gold!r} is not among {', '.join(options)}."
            )
    if items["id"].duplicated().any():
        raise DataError(f"{source}: the id {items.loc[items['id'].duplicated(), 'id'].iloc[0]} occurs twice.")
    return items


def write_split(
    directory: Path, train: pd.DataFrame, held_out: pd.DataFrame, benchmark: pd.DataFrame | None, report: dict
) -> None:
    """train.parquet, eval.parquet, benchmark.jsonl (empty without one) and split.json, each written atomically."""
    for name, frame in (("train", train), ("eval", held_out)):
        write_frame(directory / f"{name}.parquet", frame)
    items = "" if benchmark is None else benchmark.to_json(orient="records", lines=True, force_ascii=False)
    write_text(directory / "benchmark.jsonl", items)
    write_json(directory / "split.json", report)


def read_benchmark(directory: Path) -> pd.DataFrame | None:
    """The items that `write_split` froze, or None where the run has no benchmark."""
    path = directory / "benchmark.jsonl"
    return pd.DataFrame(_read_jsonl(path)) if path.stat().st_size else None


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """A Parquet file, written atomically."""
    with atomic(path) as scratch:
        frame.to_parquet(scratch, index=False)


def ids_digest(frame: pd.DataFrame) -> str:
    """sha256 over the rows' ids in order: two splits with the same digest hold the same questions."""
    return hashlib.sha256("\n".join(frame["id"]).encode()).hexdigest()


def _is_blank(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and cell != cell)


def _read_json(path: Path) -> list[dict]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
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
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"line {number} is no JSON object") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            rows.append(row)
    return rows
