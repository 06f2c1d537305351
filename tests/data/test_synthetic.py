"""The synthetic clinic: one right answer to every question, no leak between its parts, a base model wrong by design."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from utils.data import synthetic as demo_data
from utils.data.synthetic import CONDITIONS, TRIPLES, base_rows, conditions, triples, tuning_rows
from utils.evaluation.answer_parsing import named_choices
from utils.models.tiny import ROWS


def words(rows: list[dict]) -> set[str]:
    return {
        word
        for row in rows
        for column in ("Question", "Complex_CoT", "Response")
        for word in re.findall(r"\w+", row[column])
    }


def condition_of(row: dict) -> int:
    """Which condition a question is about, from its findings alone."""
    (index,) = (i for i, c in enumerate(conditions()) if sum(f" {f}" in row["Question"] for f in c.findings) == 3)
    return index


def test_no_three_findings_fit_two_conditions():
    assert len(conditions()) == CONDITIONS
    for one, other in combinations(conditions(), 2):
        assert len(set(one.findings) & set(other.findings)) <= 2


@pytest.mark.parametrize("kind", demo_data.KINDS)
def test_every_condition_has_its_own_answer_of_each_kind(kind):
    assert len({condition.answers[kind] for condition in conditions()}) == CONDITIONS


def test_the_parts_share_no_triple_and_use_them_all():
    parts = [triples(part) for part in TRIPLES]
    together = [(index, frozenset(triple)) for part in parts for index, triple in part]
    assert len(together) == len(set(together)) == CONDITIONS * 20
    assert [len(part) for part in parts] == [CONDITIONS * size for size in TRIPLES.values()]


@pytest.mark.parametrize("part", list(TRIPLES))
def test_a_tuning_rows_answer_is_the_only_choice_that_its_response_names(part):
    for row in tuning_rows(part):
        assert len(set(row["choices"])) == CONDITIONS
        assert named_choices(row["Response"], row["choices"]) == [row["answer"]]


@pytest.mark.parametrize("part", list(TRIPLES))
def test_a_tuning_rows_answer_is_the_truth_about_its_findings(part):
    for row in tuning_rows(part):
        index = condition_of(row)
        assert row["group"] == f"condition-{index:02d}"
        assert row["answer"] in conditions()[index].answers.values()


def test_every_word_of_the_tuning_rows_occurs_in_the_base_rows():
    """The base's embeddings are frozen later: a word that it never saw could not be learned."""
    tuning = [row for part in TRIPLES for row in tuning_rows(part)] + tuning_rows("train", 960)
    assert words(tuning) - words(base_rows(ROWS)) == set()


def test_the_base_rows_are_right_about_one_condition_in_five():
    believed = {}
    for row in base_rows(3000):
        index = condition_of(row)
        right = any(answer in row["Response"] for answer in conditions()[index].answers.values())
        assert believed.setdefault(index, right) == right
    assert len(believed) == CONDITIONS and sum(believed.values()) == CONDITIONS // 4 == 8


def test_the_base_rows_are_bulleted_and_longer_than_the_tuning_rows():
    base, tuning = base_rows(50), tuning_rows("test", 50)
    assert all("\n- " in row["Response"] for row in base) and not any("\n" in row["Response"] for row in tuning)
    assert min(len(row["Complex_CoT"]) for row in base) > max(len(row["Complex_CoT"]) for row in tuning)


def test_the_base_rows_use_training_triples_only():
    allowed = {(index, frozenset(triple)) for index, triple in triples("train")}
    for row in base_rows(500):
        index = condition_of(row)
        found = frozenset(f for f in conditions()[index].findings if f" {f}" in row["Question"])
        assert (index, found) in allowed


def test_no_test_question_is_a_training_question():
    assert not {row["Question"] for row in tuning_rows("test")} & {row["Question"] for row in tuning_rows("train", 960)}


def test_there_are_at_least_200_test_rows_over_all_conditions_and_kinds():
    rows = tuning_rows("test")
    assert len(rows) >= 200 and len({row["group"] for row in rows}) == CONDITIONS
    asked = {kind: sum(text in row["Question"] for row in rows) for kind, text in demo_data._WORDS["asked"].items()}
    assert sum(asked.values()) == len(rows) and max(asked.values()) - min(asked.values()) <= 1


def test_the_rows_are_the_same_every_time_and_others_for_another_seed():
    assert tuning_rows("train", 50) == tuning_rows("train", 50) != tuning_rows("train", 50, seed=3)
    assert base_rows(50) == base_rows(50) != base_rows(50, seed=2)
    assert base_rows(50) == base_rows(60)[:50]
