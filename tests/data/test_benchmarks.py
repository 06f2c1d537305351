"""Benchmark items: three schemas in four formats become one form, and what is not as it should be gets one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from utils.config import load_config, read_config
from utils.data.benchmarks import COLUMNS, describe_primary, load_benchmarks, load_items
from utils.errors import ConfigError, DataError
from utils.schema import BenchmarkSection, EvaluateSection

ITEM = {"question": "Which?", "options": {"A": "one", "B": "two"}, "answer_idx": "A"}
TOPICS = "gout measles anaemia asthma rabies scabies lupus tetanus".split()
MEDMCQA = [
    {"id": f"m{i}", "question": f"Which drug for {t}?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": i % 4}
    for i, t in enumerate(TOPICS)
]
PUBMEDQA = [
    {
        "pubid": 100 + i,
        "question": f"Does {t} shorten life?",
        "context": {"contexts": [f"Background of {t}.", "Results: it did."], "labels": ["BACKGROUND", "RESULTS"]},
        "final_decision": ("yes", "no", "maybe")[i % 3],
    }
    for i, t in enumerate(TOPICS)
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, rows: int | None = None, seed: int = 1) -> pd.DataFrame:
    count = rows or (8 if path.suffix != ".jsonl" else len(path.read_text(encoding="utf-8").splitlines()))
    return load_benchmarks(EvaluateSection(benchmark=BenchmarkSection(path=path, rows=count), seed=seed))


def benchmark(tmp_path: Path, items: list[dict], rows: int | None = None, seed: int = 1) -> pd.DataFrame:
    return load(write_jsonl(tmp_path / "items.jsonl", items), rows, seed)


def refusal(tmp_path: Path, items: list[dict], rows: int | None = None) -> str:
    with pytest.raises(DataError) as caught:
        benchmark(tmp_path, items, rows)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and "items.jsonl" in message
    return message


def test_without_a_benchmark_there_are_no_items():
    assert load_benchmarks(EvaluateSection()) is None


def test_a_benchmark_is_drawn_by_seed_and_keeps_the_order_of_the_file(tmp_path):
    items = [ITEM | {"question": f"Which {i:02d}?"} for i in range(30)]
    first, again, other = (benchmark(tmp_path, items, 10, seed) for seed in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)
    assert first["question"].is_monotonic_increasing and len(first) == 10
    assert list(first.columns) == list(COLUMNS) and set(first["benchmark"]) == {"items"}


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([ITEM | {"answer_idx": "C"}], "item test-0: the right letter 'C' is not among A, B."),
        ([ITEM | {"answer_idx": None}], "item test-0: the right letter None is not among A, B."),
        ([ITEM | {"options": {"A": "one"}}], "item test-0: options must map at least two letters to texts."),
        ([ITEM | {"options": {"A": "one", "B": ""}}], "item test-0: options must map at least two letters to texts."),
        ([ITEM | {"options": ["one", "two"]}], "item test-0: options must map at least two letters to texts."),
        ([ITEM | {"options": "one or two"}], "item test-0: options must map at least two letters to texts."),
        ([ITEM, ITEM | {"question": "  "}], "item test-1: the question is empty."),
        ([ITEM | {"id": 7}, ITEM | {"id": 7}], "the id 7 occurs twice."),
        ([{"question": "Which?", "opa": "a", "cop": 1}], "lacks options, answer_idx; expected question, options and"),
        ([{"q": "Which?"}], "opa to opd and cop (MedMCQA), or question, context and final_decision (PubMedQA)."),
        (
            [row | {"cop": 1 + i % 2} for i, row in enumerate(MEDMCQA)],
            "cop holds 1, 2, so where it counts from cannot be told",
        ),
        (
            [row | {"cop": 4 * (i % 2)} for i, row in enumerate(MEDMCQA)],
            "cop holds 0, 4, so where it counts from cannot be told",
        ),
        (
            [row | {"cop": 7 * (i % 2)} for i, row in enumerate(MEDMCQA)],
            "cop holds 0, 7, so where it counts from cannot be told",
        ),
        ([MEDMCQA[0], MEDMCQA[1] | {"cop": -1}], "take MedMCQA's split validation."),
        ([MEDMCQA[0] | {"cop": "b"}], "cop must be a whole number"),
        (
            [MEDMCQA[0] | {"opb": "", "opc": None, "opd": ""}],
            "item m0: options must map at least two letters to texts.",
        ),
        ([PUBMEDQA[0] | {"final_decision": "perhaps"}], "item 100: the right letter 'perhaps' is not among A, B, C."),
        ([PUBMEDQA[0] | {"question": " "}], "item 100: the question is empty."),
        ([PUBMEDQA[0], PUBMEDQA[0]], "the id 100 occurs twice."),
    ],
)
def test_a_benchmark_that_is_not_as_expected_is_refused_by_the_item(tmp_path, items, said):
    message = refusal(tmp_path, items)
    assert said in message and message.startswith("items.jsonl")


def test_more_items_than_there_are_is_refused_with_both_numbers(tmp_path):
    assert refusal(tmp_path, [ITEM, ITEM], rows=9) == "evaluate.benchmark.rows asks for 9 items; items.jsonl has 2."


@pytest.mark.parametrize("content", [None, ""], ids=["missing", "empty"])
def test_a_missing_or_empty_file_is_refused_in_the_benchmarks_own_terms(tmp_path, content):
    if content is not None:
        (tmp_path / "items.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        load_benchmarks(EvaluateSection(benchmark=BenchmarkSection(path=tmp_path / "items.jsonl")))
    assert "data.path" not in str(caught.value) and "Complex_CoT" not in str(caught.value)
    assert ("evaluate.benchmark.path" if content is None else "answer_idx") in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("schema", ["medqa", "medqa list", "medmcqa", "pubmedqa"])
def test_every_schema_reads_alike_from_every_format(tmp_path, schema, suffix):
    letters = {"A": "w", "B": "x", "C": "y", "D": "z"}
    listed = [{"key": key, "value": value} for key, value in letters.items()]
    rows = {
        "medmcqa": MEDMCQA,
        "pubmedqa": PUBMEDQA,
        "medqa": [ITEM | {"question": f"{t}?", "options": letters} for t in TOPICS],
        "medqa list": [ITEM | {"question": f"{t}?", "options": listed} for t in TOPICS],
    }[schema]
    path = tmp_path / f"items{suffix}"
    if suffix == ".csv":
        rows = [{k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()} for row in rows]
        rows = [row | {"context": "Background."} if "context" in row else row for row in rows]
        pd.DataFrame(rows).to_csv(path, index=False)
    elif suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    items = load(path)
    assert len(items) == 8 and items["id"].is_unique and items["options"].map(len).isin([3, 4]).all()
    expected = {"medqa": ["A"] * 8, "medqa list": ["A"] * 8, "medmcqa": list("ABCDABCD"), "pubmedqa": list("ABCABCAB")}
    assert items["gold"].tolist() == expected[schema]
    if schema != "pubmedqa":
        assert items["options"].iloc[0] == letters and items["stem"].equals(items["question"])
    assert items["benchmark"].iloc[0] == (schema if schema in ("medmcqa", "pubmedqa") else "items")


def test_medmcqas_original_files_count_from_one(tmp_path):
    items = benchmark(tmp_path, [row | {"cop": row["cop"] + 1} for row in MEDMCQA])
    assert items["gold"].tolist() == list("ABCDABCD")


def test_the_count_from_zero_or_one_is_told_from_the_whole_file_and_not_from_what_is_drawn(tmp_path):
    rows = [row | {"cop": 1} for row in MEDMCQA[:7]] + [MEDMCQA[7] | {"cop": 4}]
    assert set(benchmark(tmp_path, rows, rows=3)["gold"]) <= {"A", "D"}


def test_pubmedqa_is_asked_below_its_abstract_and_compared_without_it(tmp_path):
    items = benchmark(tmp_path, PUBMEDQA)
    assert items["question"].iloc[0] == "Background of gout.\nResults: it did.\n\nDoes gout shorten life?"
    assert items["stem"].iloc[0] == "Does gout shorten life?"
    assert items["options"].iloc[0] == {"A": "yes", "B": "no", "C": "maybe"}


def test_pubmedqas_own_file_is_one_object_by_id(tmp_path):
    path = tmp_path / "ori_pqal.json"
    rows = {
        str(row["pubid"]): {
            "QUESTION": row["question"],
            "CONTEXTS": row["context"]["contexts"],
            "LABELS": ["x"],
            "YEAR": "2011",
            "final_decision": row["final_decision"],
        }
        for row in PUBMEDQA
    }
    path.write_text(json.dumps(rows))
    items = load(path)
    expected = benchmark(tmp_path, PUBMEDQA)
    assert items.drop(columns="group").equals(expected.drop(columns="group"))


def test_several_benchmarks_keep_their_names_and_their_ids_stay_unique(tmp_path):
    medqa = write_jsonl(
        tmp_path / "medqa_test.jsonl", [ITEM | {"id": f"m{i}", "question": t} for i, t in enumerate(TOPICS)]
    )
    medmcqa = write_jsonl(tmp_path / "validation.jsonl", MEDMCQA)
    sections = [BenchmarkSection(path=path, rows=8) for path in (medmcqa, medqa)]
    items = load_benchmarks(EvaluateSection(benchmark=BenchmarkSection(path=medqa, rows=8), more_benchmarks=sections))
    assert items["benchmark"].tolist() == ["medqa"] * 8 + ["medmcqa"] * 8 + ["medqa-2"] * 8
    assert items["id"].is_unique
    assert [items["id"].iloc[i] for i in (0, 8, 16)] == ["m0", "medmcqa:m0", "medqa-2:m0"]
    assert items["group"].iloc[16] == "m0"  # the same question again, in another benchmark


def test_near_duplicates_inside_a_benchmark_share_a_group(tmp_path):
    questions = [
        "Kayser-Fleischer rings are seen in",
        "In which disease are Kayser-Fleischer rings observed?",
        "Auer rods?",
    ]
    items = benchmark(tmp_path, [ITEM | {"id": str(i), "question": q} for i, q in enumerate(questions)])
    assert items["group"].tolist() == ["0", "0", "2"]
    # All are probed, as many units, also from a file that was filtered before and kept its index.
    table = pd.read_json(tmp_path / "items.jsonl", lines=True, dtype=False).set_axis([7, 9, 11])
    table.to_parquet(tmp_path / "filtered.parquet")
    probed = load_items(BenchmarkSection(path=tmp_path / "filtered.parquet", rows=1))
    assert probed["group"].tolist() == ["0", "0", "2"]


def test_a_hub_benchmark_is_loaded_with_its_subset_revision_and_split(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return SimpleNamespace(to_pandas=lambda: pd.DataFrame(PUBMEDQA))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    section = BenchmarkSection(name="qiaojin/PubMedQA", subset="pqa_labeled", revision="abc", split="train", rows=5)
    items = load_benchmarks(EvaluateSection(benchmark=section))
    assert asked == [(("qiaojin/PubMedQA", "pqa_labeled"), {"revision": "abc", "split": "train"})]
    assert set(items["benchmark"]) == {"pubmedqa"} and len(items) == 5


def test_a_further_benchmark_without_name_or_path_is_refused():
    with pytest.raises(ConfigError, match=r"each of more_benchmarks needs a name"):
        load_config("demo", {"evaluate.more_benchmarks": [{"rows": 3}]})
    with pytest.raises(ConfigError, match=r"evaluate.more_benchmarks.0.row is not a setting; did you mean"):
        load_config("demo", {"evaluate.more_benchmarks": [{"path": "x.jsonl", "row": 3}]})


def test_full_measures_on_three_benchmarks_and_t4_on_one():
    names = [section.name for section in load_config("full").evaluate.benchmarks]
    assert names == ["GBaker/MedQA-USMLE-4-options", "openlifescienceai/medmcqa", "qiaojin/PubMedQA"]
    assert len(load_config("t4").evaluate.benchmarks) == 1


def test_a_readers_own_rows_are_judged_by_their_loss_unless_they_name_a_benchmark(tmp_path):
    """Profile t4 kept MedQA as the primary metric of, say, a law data set."""
    own = load_config("t4", {"data.path": "law.jsonl", "evaluate.benchmark.rows": 50})
    assert own.evaluate.primary == "nll" and own.evaluate.benchmark.name == "GBaker/MedQA-USMLE-4-options"
    assert describe_primary(own) == (
        "primary metric: held-out loss on law.jsonl; GBaker/MedQA-USMLE-4-options is measured beside it, "
        "evaluate.primary=multiple_choice puts it first"
    )
    (tmp_path / "config.yaml").write_text(own.to_yaml(), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml", {"train.max_steps": 3}).evaluate.primary == "nll"
    (tmp_path / "config.yaml").write_text(load_config("t4").to_yaml(), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml", {"data.path": "law.jsonl"}).evaluate.primary == "nll"
    for named in ({"evaluate.benchmark.path": "bar_exam.jsonl"}, {"evaluate.primary": "multiple_choice"}):
        config = load_config("t4", {"data.path": "law.jsonl", **named})
        assert config.evaluate.primary == "multiple_choice"
    assert describe_primary(load_config("t4")) == "primary metric: multiple-choice accuracy"
    assert describe_primary(load_config("demo")) == "primary metric: accuracy by rule"
