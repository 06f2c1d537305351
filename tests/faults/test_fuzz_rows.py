"""Data files that nobody should have written: each ends in a sentence, or in exactly the rows that it holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import strategies as st

from tests.faults.fuzzing import CORPUS, VALUES, corpus, mutated_bytes, mutated_values, survive, to_json
from utils.data.near_duplicates import normalise
from utils.data.rows import COLUMNS, check_rows, read_table

SHARES = {".jsonl": 1500, ".json": 800, ".csv": 1500, ".parquet": 1200}
ROWS = [
    json.loads(line)
    for line in (CORPUS / "rows" / "with-choices.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
WRITERS = {
    ".jsonl": lambda rows, path: path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"),
    ".json": lambda rows, path: path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8"),
    ".csv": lambda rows, path: pd.DataFrame(rows).to_csv(path, index=False),
    ".parquet": lambda rows, path: pd.DataFrame(rows).to_parquet(path, index=False),
}


def load(path: Path) -> pd.DataFrame:
    return check_rows(read_table(path), path.name)


def check_frame(frame: pd.DataFrame) -> None:
    """What everything after it relies on."""
    assert len(frame) and set(COLUMNS) <= set(frame.columns)
    for column in COLUMNS:
        for cell in frame[column]:
            assert type(cell) is str and cell.strip() == cell and cell
            cell.encode()  # no half characters
    ids = [hashlib.sha256(normalise(question).encode()).hexdigest()[:12] for question in frame["Question"]]
    assert list(frame["id"]) == ids


def check_file(path: Path) -> None:
    frame, _ = survive(load, path)
    if frame is not None:
        check_frame(frame)
        if expected := _plainly_read(path):
            found = frame[list(COLUMNS)].to_dict("records")
            assert found == [{column: row[column].strip() for column in COLUMNS} for row in expected]


def _plainly_read(path: Path) -> list[dict] | None:
    """The rows of a JSON or JSONL file as the plainest reader sees them; None for other kinds."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8-sig"))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    return None


@pytest.mark.parametrize("path", corpus("rows"), ids=lambda path: path.name)
def test_every_file_of_the_corpus_ends_in_a_sentence_or_its_rows(path):
    check_file(path)


@pytest.mark.parametrize("suffix", SHARES)
def test_a_damaged_data_file_ends_in_a_sentence_or_its_rows(suffix, tmp_path, fuzz):
    path = tmp_path / f"rows{suffix}"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        check_file(path)

    seeds = [file.read_bytes() for file in corpus("rows", f"*{suffix}")]
    fuzz.run(f"data files, {suffix[1:].upper()}: bytes", SHARES[suffix], mutated_bytes(seeds), check)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_another_shape_end_in_a_sentence_or_as_they_are(suffix, tmp_path, fuzz):
    path = tmp_path / f"rows{suffix}"

    def check(value) -> None:
        rows = value if isinstance(value, list) else [value]
        path.write_bytes(to_json(value) if suffix == ".json" else b"\n".join(map(to_json, rows)))
        check_file(path)

    fuzz.run("data files: other types, missing and nested cells", 500, mutated_values([ROWS]), check)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_cells_of_mixed_types_end_in_a_sentence_or_as_text(suffix, tmp_path, fuzz):
    path = tmp_path / f"rows{suffix}"

    def check(rows: list[dict]) -> None:
        try:
            WRITERS[suffix](rows, path)
        except (ValueError, TypeError, OverflowError, NotImplementedError):  # what cannot be written cannot be read
            return
        check_file(path)

    cells = st.one_of(TEXT, VALUES)
    rows = st.lists(
        st.fixed_dictionaries(dict.fromkeys(COLUMNS, cells), optional={"group": cells}), min_size=1, max_size=4
    )
    fuzz.run("data files: cells of mixed types", 250, rows, check)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "gb18030"]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_another_encoding_is_read_right_or_refused_and_never_guessed(suffix, encoding, tmp_path, fuzz):
    path = tmp_path / f"rows{suffix}"

    def check(texts: tuple[str, ...]) -> None:
        row = dict(zip(COLUMNS, texts, strict=True))
        WRITERS[suffix]([row], path)
        path.write_bytes(path.read_bytes().decode().encode(encoding, "ignore"))
        frame, _ = survive(load, path)
        if frame is not None and encoding.startswith("utf-8"):
            assert frame[list(COLUMNS)].to_dict("records") == [{key: cell.strip() for key, cell in row.items()}]
        elif frame is not None:
            check_frame(frame)

    cell = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=12)
    fuzz.run("data files: encodings", 40, st.tuples(cell, cell, cell), check)
