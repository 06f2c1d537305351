"""Benchmark files that nobody should have written: a sentence, or items that can be asked and judged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import strategies as st

from tests.faults.fuzzing import NASTY, corpus, mutated_bytes, mutated_values, survive, to_json
from utils.config import load_config
from utils.data.benchmarks import load_benchmarks, load_items
from utils.data.prompts import format_multiple_choice
from utils.data.rows import read_benchmark
from utils.evaluation.questions import build_questions, collect_references
from utils.files import write_text
from utils.schema import BenchmarkSection, EvaluateSection

SHARES = {".jsonl": 500, ".json": 400, ".csv": 400, ".parquet": 200}
SCHEMAS = {
    "medqa": [{"id": "a", "question": "Which?", "options": {"A": "Iron", "B": "Zinc"}, "answer_idx": "B"},
              {"id": "b", "question": "Where?", "options": {"A": "Left", "B": "Right"}, "answer_idx": "A"}],
    "medmcqa": [{"question": f"Which {i}?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": i} for i in range(4)],
    "pubmedqa": [{"pubid": 1, "question": "Does it?", "context": {"contexts": ["One."]}, "final_decision": "yes"},
                 {"pubid": 2, "question": "Is it?", "context": {"contexts": []}, "final_decision": "no"}],
}  # fmt: skip


CONFIG, NOTHING = load_config("demo"), pd.DataFrame({"id": [], "Question": []})


def load(path: Path) -> pd.DataFrame:
    return load_items(BenchmarkSection(path=path))


def load_all(path: Path) -> pd.DataFrame | None:
    """With groups and a draw: what 00 does, and slower."""
    return load_benchmarks(EvaluateSection(benchmark=BenchmarkSection(path=path, rows=1)))


def check_items(items: pd.DataFrame, folder: Path) -> None:
    """An item can be asked, judged, and is the same when it is read again."""
    assert items["id"].is_unique
    for item in items.itertuples():
        assert type(item.question) is str and item.question.strip()
        assert len(item.options) >= 2 and all(re.fullmatch("[A-Z]", letter) for letter in item.options)
        assert all(type(text) is str and text.strip() for text in item.options.values())
        assert item.gold in item.options
        format_multiple_choice(item.question, item.options).encode()
    write_text(folder / "benchmark.jsonl", items.to_json(orient="records", lines=True, force_ascii=False))
    again = read_benchmark(folder)
    assert build_questions(CONFIG, NOTHING, again) == build_questions(CONFIG, NOTHING, items)
    assert collect_references(NOTHING, again) == collect_references(NOTHING, items)


def check_file(path: Path, folder: Path, read: Callable = load) -> None:
    items, _ = survive(read, path)
    if items is not None:
        check_items(items, folder)


@pytest.mark.parametrize("path", corpus("items"), ids=lambda path: path.name)
def test_every_file_of_the_corpus_ends_in_a_sentence_or_its_items(path, tmp_path):
    check_file(path, tmp_path)
    check_file(path, tmp_path, load_all)


def test_a_damaged_benchmark_is_drawn_from_and_grouped_or_refused(tmp_path, fuzz):
    path = tmp_path / "items.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        check_file(path, tmp_path, load_all)

    seeds = [file.read_bytes() for file in corpus("items", "*.jsonl")]
    fuzz.run("benchmark files: bytes", 150, mutated_bytes(seeds), check)


@pytest.mark.parametrize("suffix", SHARES)
def test_a_damaged_benchmark_file_ends_in_a_sentence_or_its_items(suffix, tmp_path, fuzz):
    path = tmp_path / f"items{suffix}"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        check_file(path, tmp_path)

    seeds = [file.read_bytes() for file in corpus("items", f"*{suffix}")]
    fuzz.run("benchmark files: bytes", SHARES[suffix], mutated_bytes(seeds), check)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_items_of_another_shape_end_in_a_sentence_or_can_be_asked(schema, tmp_path, fuzz):
    path = tmp_path / "items.json"

    def check(value) -> None:
        path.write_bytes(to_json(value))
        check_file(path, tmp_path)

    fuzz.run("benchmark files: other types, missing and nested cells", 300, mutated_values([SCHEMAS[schema]]), check)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_column_of_anything_ends_in_a_sentence_or_can_be_asked(schema, tmp_path, fuzz):
    """The whole column, so that its type is another one and not only that of a cell."""
    path, rows = tmp_path / "items.json", SCHEMAS[schema]

    def check(chosen: tuple[str, list]) -> None:
        name, cells = chosen
        path.write_bytes(to_json([{**row, name: cell} for row, cell in zip(rows, cells, strict=True)]))
        check_file(path, tmp_path)

    names = st.sampled_from([*rows[0], "id", "pubid", "stem", "group"])
    cells = st.lists(st.sampled_from(NASTY), min_size=len(rows), max_size=len(rows))
    fuzz.run("benchmark files: a column of another type", 150, st.tuples(names, cells), check)
