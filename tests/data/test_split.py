"""The frozen split: every leak that is planted is found, no group is on both sides, and every row is accounted for."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config import load_config
from utils.data.prompts import TUTORIAL_QUESTION
from utils.data.split import split_rows
from utils.errors import DataError
from utils.project import ROOT
from utils.schema import Config

PLANTED = ROOT / "tests" / "planted"
REAL = Path(os.environ.get("SERIES_SHARED", ROOT.parent / "shared")) / "data"
FACTS, VIGNETTES = (
    [
        (row["source"], row["rewrite"])
        for row in map(json.loads, (PLANTED / name).read_text(encoding="utf-8").splitlines())
    ]
    for name in ("facts.jsonl", "vignettes.jsonl")
)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(questions: list[str], groups: list[str | None] | None = None) -> list[dict]:
    rows = [
        {"Question": q, "Complex_CoT": f"Thought {i}.", "Response": f"Answer {i}."} for i, q in enumerate(questions)
    ]
    return rows if groups is None else [row | {"group": group} for row, group in zip(rows, groups, strict=True)]


def numbered(count: int) -> list[dict]:
    return rows_of([f"Question {i}?" for i in range(count)])


def items_of(questions: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"item-{i}" for i in range(len(questions))], "question": questions, "stem": questions})


def local(path: Path, **data) -> Config:
    """The demo profile on a local file."""
    return load_config("demo", {"data.path": str(path), **{f"data.{key}": value for key, value in data.items()}})


def split(tmp_path: Path, questions: list[str], items: pd.DataFrame | None = None, groups=None, **data):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(questions, groups))
    return split_rows(local(path, **data), items)


def accounted(train: pd.DataFrame, held_out: pd.DataFrame, report: dict) -> bool:
    """Every row of the source is in exactly one place."""
    away = [entry["row"] for part in ("dropped", "excluded") for entry in report[part]]
    total = len(train) + report["validation_rows"] + len(held_out) + len(away) + report["not_drawn"]
    return len(set(away)) == len(away) and report["not_drawn"] >= 0 and total == report["source_rows"]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    eval_rows=st.integers(1, 40),
    train_rows=st.none() | st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_any_split_is_disjoint_and_fixed_by_its_seed_or_refused(tmp_path_factory, count, eval_rows, train_rows, seed):
    path = write_jsonl(tmp_path_factory.mktemp("split") / "rows.jsonl", numbered(count))
    config = local(path, eval_rows=eval_rows, train_rows=train_rows, seed=seed)
    if eval_rows + 1 > count:
        with pytest.raises(DataError, match=r"data\.eval_rows asks for"):
            split_rows(config)
        return
    train, _, held_out, report = split_rows(config)
    assert not set(train["id"]) & set(held_out["id"])
    assert len(held_out) == eval_rows == report["eval_rows"]
    assert len(train) == min(train_rows or count, count - eval_rows) == report["train_rows"]
    again_train, _, again_held_out, again = split_rows(config)
    assert again == report and again_train.equals(train) and again_held_out.equals(held_out)


def test_validation_rows_are_drawn_from_what_trains_and_leave_the_held_out_rows_as_they_were(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(30))
    without, validated = (
        split_rows(local(path, eval_rows=5, train_rows=10, validation_rows=count)) for count in (None, 6)
    )
    assert validated[2].equals(without[2]) and (len(without[1]), len(validated[1])) == (0, 6)
    assert validated[3]["not_drawn"] == without[3]["not_drawn"] - 6 == 9


def test_the_embedded_validation_rows_share_no_question_with_the_other_parts():
    train, validation, held_out, report = split_rows(load_config("demo", {"data.validation_rows": 32}))
    assert len(validation) == 32 and accounted(train, held_out, report)
    assert not set(validation["id"]) & {*train["id"], *held_out["id"]}
    assert held_out.equals(split_rows(load_config("demo"))[2])


def test_more_validation_rows_than_are_left_are_refused_with_both_numbers(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(10))
    with pytest.raises(DataError, match=r"data.validation_rows asks for 8 validation rows, but only 7 can be held out"):
        split_rows(local(path, eval_rows=2, validation_rows=8))
    with pytest.raises(DataError, match=r"data.validation_rows asks for 65 validation rows, but only 64"):
        split_rows(load_config("demo", {"data.validation_rows": 65}))


def test_another_seed_holds_out_other_rows(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(60))
    first, second = (set(split_rows(local(path, eval_rows=20, seed=seed))[2]["id"]) for seed in (1, 2))
    assert first != second


def test_more_held_out_rows_than_there_are_is_refused_with_both_numbers(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(10))
    with pytest.raises(
        DataError, match=r"data.eval_rows asks for 11 held-out rows, but only 9 can be held out; lower it"
    ):
        split_rows(local(path, eval_rows=11))


def test_more_questions_than_held_out_rows_are_refused_with_both_numbers(tmp_path):
    """They were silently as many as there were rows: another n than the one that was asked for."""
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(10))
    expected = r"evaluate.questions asks for 4 answers in words, but data.eval_rows holds out only 3 rows"
    for given_path in ({"data.path": str(path)}, {}):
        with pytest.raises(DataError, match=expected):
            split_rows(load_config("demo", {**given_path, "data.eval_rows": 3, "evaluate.questions": 4}))
        config = load_config("demo", {**given_path, "data.eval_rows": 3, "evaluate.questions": 3})
        assert len(split_rows(config)[2]) == 3


def test_more_held_out_rows_than_the_embedded_data_has_is_refused():
    with pytest.raises(DataError, match=r"data.eval_rows asks for 5000 held-out rows, but only 224 can be held out"):
        split_rows(load_config("demo", {"data.eval_rows": 5000}))


def test_exact_duplicates_are_dropped_and_reported(tmp_path):
    rows = numbered(10)
    rows[7]["Question"] = "  QUESTION\u00a0 3? "
    rows[9]["Question"] = "Ｑuestion 3?"
    train, _, held_out, report = split_rows(local(write_jsonl(tmp_path / "rows.jsonl", rows), eval_rows=3))
    together = pd.concat([train, held_out])
    assert together["id"].is_unique and len(together) == 8
    assert "Answer 3." in set(together["Response"])
    assert [entry["reason"] for entry in report["dropped"]] == ["same question as an earlier row"] * 2
    assert {entry["id"] for entry in report["dropped"]} <= set(together["id"])


def test_the_embedded_split_is_disjoint_and_labelled_as_synthetic():
    train, _, held_out, report = split_rows(load_config("demo"))
    assert not set(train["id"]) & set(held_out["id"]) and held_out["id"].is_unique
    assert report["source"] == "embedded synthetic data" and (len(train), len(held_out)) == (960, 224)


def test_planted_leaks_are_found_among_unrelated_rows(tmp_path):
    """Half of the pairs leak from the benchmark into the rows, half from one row to another; and three exact copies."""
    pairs = VIGNETTES + FACTS
    benchmark = items_of([source for source, _ in pairs[::2]] + [pairs[1][1]])
    leaks = [rewrite for _, rewrite in pairs[::2]]
    inside = pairs[1::2]
    questions = leaks + [text for pair in inside for text in pair]
    questions += [pairs[1][1].upper(), inside[2][0].replace(" ", "  "), inside[3][1].upper()]
    train, _, held_out, report = split(tmp_path, questions, benchmark, eval_rows=10)
    assert accounted(train, held_out, report)
    dropped = {entry["row"] - 1: entry for entry in report["dropped"]}
    hits = [i in dropped and dropped[i]["near"] == f"item-{i}" for i in range(len(leaks))]
    group_of = pd.concat([train, held_out]).set_index("Question")["group"]
    joined = [group_of.get(a, "a") == group_of.get(b, "b") or {a, b} - set(group_of.index) != set() for a, b in inside]
    assert sum(hits) >= 0.9 * len(hits) and sum(joined) >= 0.9 * len(joined)
    assert {len(questions) - 3, len(questions) - 2, len(questions) - 1} <= set(dropped)  # the exact copies
    assert report["contamination"]["near_benchmark"] >= sum(hits)
    assert report["contamination"]["largest_cosine_train_eval"] < 0.5
    assert report["contamination"]["largest_cosine_train_benchmark"] < 0.5


@pytest.mark.skipif(not REAL.is_dir(), reason="the real sample is not beside this checkout")
def test_of_the_real_rows_at_most_two_percent_are_lost(tmp_path):
    items = [json.loads(line) for line in (REAL / "medqa_sample.jsonl").read_text(encoding="utf-8").splitlines()]
    benchmark = pd.DataFrame({"id": [i["id"] for i in items], "stem": [i["question"] for i in items]})
    train, _, held_out, report = split_rows(local(REAL / "medical_o1_sample.jsonl", eval_rows=24), benchmark)
    assert len(report["dropped"]) + len(report["excluded"]) <= 0.02 * report["source_rows"]
    assert len(held_out) == 24 and accounted(train, held_out, report)


def test_rows_that_are_all_benchmark_items_are_refused(tmp_path):
    questions = [source for source, _ in FACTS[:2]]
    with pytest.raises(DataError, match="All 2 rows repeat a benchmark item or the tutorials' question"):
        split(tmp_path, questions, items_of(questions), eval_rows=1)


def test_every_entry_names_the_row_the_reason_and_what_it_is_near(tmp_path):
    source, rewrite = FACTS[3]
    _, _, _, report = split(
        tmp_path, ["One?", "Two?", rewrite, "one ?", "ONE?"], items_of(["Other?", source]), eval_rows=1
    )
    entries = {entry["row"]: entry for entry in report["dropped"]}
    assert entries[3]["reason"] == "near duplicate of a benchmark item" and entries[3]["near"] == "item-1"
    assert 0.5 <= entries[3]["cosine"] <= 1
    assert entries[5]["reason"] == "same question as an earlier row" and entries[5]["cosine"] == 1


def test_a_row_near_an_item_whose_letter_alone_is_probed_is_dropped_too(tmp_path):
    probed = items_of([source for source, _ in FACTS[:6]])
    rows = write_jsonl(tmp_path / "rows.jsonl", rows_of(["One?", "Two?"] + [rewrite for _, rewrite in FACTS[:6]]))
    drawn = split_rows(local(rows, eval_rows=1), probed.head(2))[3]
    assert {entry["near"] for entry in drawn["dropped"]} == {"item-0", "item-1"}
    for benchmark in (probed.head(2), None):
        train, _, held_out, report = split_rows(local(rows, eval_rows=1), benchmark, probed)
        assert {entry["near"] for entry in report["dropped"]} == {f"item-{i}" for i in range(6)}
        assert {*train["Question"], *held_out["Question"]} == {"One?", "Two?"}


def test_the_tutorials_question_is_in_neither_part(tmp_path):
    reworded = (
        "What would cystometry most likely show for residual volume and detrusor contractions in a 61-year-old woman with "
        "a long history of involuntary urine loss on coughing or sneezing, no leakage at night, and a Q-tip test?"
    )
    questions = [text for pair in FACTS[:8] for text in pair[:1]] + [TUTORIAL_QUESTION.upper() + " ", reworded]
    train, _, held_out, report = split(tmp_path, questions, eval_rows=2, train_rows=3)
    assert not any("cystometry" in text.lower() for text in [*train["Question"], *held_out["Question"]])
    assert set(report["tutorial_question"]) == {"id", "Question", "Complex_CoT", "Response"}
    assert (report["tutorial_question"]["Response"], [entry["row"] for entry in report["dropped"]]) == (
        "Answer 8.",
        [9, 10],
    )
    assert accounted(train, held_out, report)


def test_without_the_tutorials_question_none_is_shown(tmp_path):
    report = split(tmp_path, [source for source, _ in FACTS[:6]], eval_rows=2)[3]
    assert report["tutorial_question"] == {}


@settings(deadline=None, max_examples=60)
@given(
    picks=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 1)), min_size=4, max_size=20, unique=True),
    groups=st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=20, max_size=20),
    eval_rows=st.integers(1, 8),
    train_rows=st.none() | st.integers(1, 8),
    validation_rows=st.none() | st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_no_group_is_in_two_parts_and_every_row_is_accounted_for(
    tmp_path_factory, picks, groups, eval_rows, train_rows, validation_rows, seed
):
    questions = [FACTS[i][which] for i, which in picks]
    folder = tmp_path_factory.mktemp("split")
    arguments = dict(eval_rows=eval_rows, train_rows=train_rows, seed=seed)
    arguments["validation_rows"] = validation_rows
    try:
        train, validation, held_out, report = split(
            folder, questions, items_of([FACTS[11][0]]), groups[: len(picks)], **arguments
        )
    except DataError as error:
        assert str(error).startswith("data.") and str(error).endswith(".")
        return
    assert len(held_out) == eval_rows and len(train) >= 1 and accounted(train, held_out, report)
    assert len(validation) == (validation_rows or 0)
    together = pd.concat([frame.assign(side=i) for i, frame in enumerate((train, validation, held_out))])
    assert together["id"].is_unique and (together.groupby("group")["side"].nunique() == 1).all()
    own = pd.Series(groups[: len(picks)], index=[text for text in questions])
    together["own"] = own[together["Question"]].to_numpy()
    assert (together.dropna(subset="own").groupby("own")["side"].nunique() == 1).all()
    assert report["contamination"]["largest_cosine_train_eval"] < 0.5
    again = split(folder, questions, items_of([FACTS[11][0]]), groups[: len(picks)], **arguments)
    assert again[3] == report and again[0].equals(train) and again[2].equals(held_out)


def test_a_group_that_does_not_fit_goes_to_training(tmp_path):
    questions, groups = [f"Question {i}?" for i in range(12)], ["big"] * 8 + [None] * 4
    for seed in range(8):
        train, _, held_out, report = split(tmp_path, questions, groups=groups, eval_rows=3, seed=seed)
        assert len(held_out) == 3 and "big" not in set(held_out["group"]) and len(train) == 9
        assert not report["excluded"] and accounted(train, held_out, report)


def test_where_only_a_part_of_a_group_fits_its_other_rows_are_excluded(tmp_path):
    questions, groups = [f"Question {i}?" for i in range(9)], ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    train, _, held_out, report = split(tmp_path, questions, groups=groups, eval_rows=4)
    assert (len(held_out), len(train), len(report["excluded"])) == (4, 3, 2)
    assert all("shares a group with a held-out row" in entry["reason"] for entry in report["excluded"])
    assert accounted(train, held_out, report)


def test_rows_that_are_all_one_question_are_refused_with_what_to_do(tmp_path):
    questions = [f"{FACTS[0][0]} {word}" for word in "please now thanks then indeed".split()]
    with pytest.raises(DataError, match=r"data.eval_rows=2 .*raise data.duplicate_threshold, or give more data.$"):
        split(tmp_path, questions, eval_rows=2)
    train, _, held_out, _ = split(tmp_path, questions, eval_rows=2, duplicate_threshold=1)
    assert (len(train), len(held_out)) == (3, 2)


def test_at_a_cosine_of_one_only_exact_copies_are_kept_out(tmp_path):
    source, rewrite = FACTS[0]
    questions = [source.upper(), rewrite, source, "Other?", "And this?"]
    train, _, held_out, report = split(tmp_path, questions, items_of([source]), eval_rows=1, duplicate_threshold=1)
    assert [entry["row"] for entry in report["dropped"]] == [3, 1] and rewrite in {
        *train["Question"],
        *held_out["Question"],
    }
    assert accounted(train, held_out, report)


@pytest.fixture
def hub(monkeypatch):
    """A function that makes `datasets.load_dataset` give these rows."""

    def give(rows: list[dict]) -> Config:
        loaded = SimpleNamespace(to_pandas=lambda: pd.DataFrame(rows))
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: loaded))
        return load_config("demo", {"data.name": "someone/rows", "data.eval_rows": 2})

    return give


def test_a_blank_cell_among_the_hubs_rows_costs_that_row_and_is_listed(hub, tmp_path):
    """20,000 rows of somebody else's are not to be mended by the reader; their own file is, and stays refused."""
    rows = numbered(8)
    rows[2]["Complex_CoT"], rows[5]["Response"] = "  ", None
    train, _, held_out, report = split_rows(hub(rows))
    assert report["dropped"] == [
        {"row": 3, "reason": "Complex_CoT is empty, and data.reasoning is required"},
        {"row": 6, "reason": "Response is empty"},
    ]
    assert accounted(train, held_out, report) and report["source_rows"] == 8 and len(train) + len(held_out) == 6
    with pytest.raises(DataError, match="row 3: Complex_CoT is empty"):
        split_rows(local(write_jsonl(tmp_path / "rows.jsonl", rows), eval_rows=2))


def test_hub_rows_that_are_all_blank_or_lack_a_column_are_refused(hub):
    with pytest.raises(DataError, match="someone/rows has no row that can be used: in the first, Response is empty"):
        split_rows(hub([row | {"Response": ""} for row in numbered(4)]))
    with pytest.raises(DataError, match=r"someone/rows lacks the column\(s\) Response"):
        split_rows(hub([{"Question": "Why?", "Complex_CoT": ""}, {"Question": "How?", "Complex_CoT": "So."}]))


def test_any_script_can_be_split(tmp_path):
    questions = [
        "一名女性患者出现发热。诊断是什么？",
        "哪种维生素缺乏会导致夜盲症？",
        "ما سبب ارتفاع ضغط الدم؟",
        "מהי צהבת?",
        "🩺🩺 💊?",
        "؟",
    ]
    train, _, held_out, report = split(tmp_path, questions, items_of(["哪种维生素缺乏会导致夜盲症 ？"]), eval_rows=2)
    assert [entry["row"] for entry in report["dropped"]] == [2]
    assert accounted(train, held_out, report) and (len(train), len(held_out)) == (3, 2)


def test_the_embedded_rows_are_exempt_and_say_so():
    report = split_rows(load_config("demo", {"data.eval_rows": 200}))[3]
    assert "templates" in report["rule"] and report["contamination"] == {}
    assert (report["not_drawn"], report["source_rows"]) == (24, 1184)


@pytest.mark.parametrize("value", [0, -0.1, 1.01, "high"])
def test_a_threshold_out_of_range_is_refused_by_its_name(value):
    from utils.errors import ConfigError

    with pytest.raises(ConfigError, match=r"data\.duplicate_threshold is"):
        load_config("demo", {"data.duplicate_threshold": value})
