"""Scores: strict, by rule, from saved answers alone."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from utils.metrics import nll_per_token, score_answers

CHOICES = ["Arden fever", "Belmar palsy"]
HELD_OUT = pd.DataFrame([{"id": "r1", "answer": "Arden fever", "choices": CHOICES, "group": "condition-01"}])
BENCHMARK = pd.DataFrame([{"id": 7, "question": "Which?", "options": {"A": "one", "B": "two"}, "gold": "B"}])


def answer(text: str, kind: str = "open", finish_reason: str = "stop") -> dict:
    return {"text": text, "kind": kind, "finish_reason": finish_reason, "tokens": 9, "reasoning_tokens": 4}


def score(text: str, kind: str = "open", held_out: pd.DataFrame = HELD_OUT, **more) -> dict:
    identifier = "7" if kind == "choice" else "r1"
    return score_answers({identifier: answer(text, kind, **more)}, held_out, BENCHMARK).iloc[0].to_dict()


@pytest.mark.parametrize(
    ("text", "correct", "parsed"),
    [
        ("Hmm.</think>It is Arden fever.", 1, 1),
        ("Hmm.</think>it is ARDEN FEVER.", 1, 1),
        ("Hmm.</think>It is Belmar palsy.", 0, 1),
        ("Hmm.</think>Arden fever or Belmar palsy.", 0, 0),
        ("Hmm.</think>Gout.", 0, 0),
        ("It is Arden fever.", 0, 0),
        ("Arden fever.</think>", 0, 0),
        ("a</think>Arden fever.</think>", 0, 0),
    ],
)
def test_an_open_answer_is_right_if_well_formed_and_naming_the_right_choice_only(text, correct, parsed):
    scored = score(text)
    assert (scored["correct"], scored["parsed"], scored["group"]) == (correct, parsed, "condition-01")


@pytest.mark.parametrize(
    ("text", "correct", "parsed"),
    [
        ("Hmm.</think>The answer is B.", 1, 1),
        ("Hmm.</think>The answer is A.", 0, 1),
        ("Hmm.</think>The answer is C.", 0, 0),
        ("Hmm.</think>two", 0, 0),
        ("The answer is B.", 0, 0),
        ("Hmm. The answer is B.</think>", 0, 0),
    ],
)
def test_a_choice_is_right_if_its_letter_is_stated_after_the_closed_block(text, correct, parsed):
    scored = score(text, "choice")
    assert (scored["correct"], scored["parsed"], scored["group"]) == (correct, parsed, "7")


@pytest.mark.parametrize("columns", [{}, {"answer": [None], "choices": [None]}, {"answer": [float("nan")]}])
def test_an_open_answer_that_no_rule_can_check_is_neither_right_nor_wrong(columns):
    scored = score("Hmm.</think>Gout.", held_out=pd.DataFrame({"id": ["r1"], **columns}))
    assert math.isnan(scored["correct"]) and math.isnan(scored["parsed"])
    assert scored["group"] == "r1" and scored["well_formed"] == 1


def test_choices_that_came_back_from_parquet_as_an_array_are_checked_alike():
    assert score("Hmm.</think>Arden fever.", held_out=HELD_OUT.assign(choices=[np.array(CHOICES)]))["correct"] == 1


def test_form_and_length_are_told_beside_the_score():
    scored = score("Hmm.</think>In points:\n\n- Arden fever", finish_reason="length")
    assert (scored["well_formed"], scored["one_paragraph"], scored["bullets"], scored["stopped"]) == (1, 0, 1, 0)
    assert (scored["tokens"], scored["reasoning_tokens"]) == (9, 4)
    assert score("Hmm.</think>Arden fever.")["one_paragraph"] == score("Hmm.</think>Arden fever.")["stopped"] == 1


def test_scores_are_sorted_by_id_whatever_the_order_of_the_answers():
    rows = pd.DataFrame({"id": ["a", "b", "c"]})
    scored = score_answers({name: answer("x</think>y") for name in "cab"}, rows, None)
    assert list(scored["id"]) == ["a", "b", "c"]


def test_no_answers_give_an_empty_table_with_its_columns():
    """`evaluate.questions=0` without a benchmark is allowed: such a run is judged by its loss alone."""
    full = score_answers({"r1": answer("x</think>y")}, HELD_OUT, None)
    empty = score_answers({}, HELD_OUT, None)
    assert len(empty) == 0 and list(empty.columns) == list(full.columns)


def test_the_loss_per_token_divides_each_part_by_its_own_tokens():
    frame = pd.DataFrame(
        {"id": ["a", "b"], "reasoning_nll": [6.0, 0.0], "response_nll": [2.0, 3.0], "reasoning_tokens": [3, 0], "response_tokens": [1, 6]}
    )  # fmt: skip
    assert nll_per_token(frame).loc["a"].to_dict() == {"completion": 2.0, "reasoning": 2.0, "response": 2.0}
    assert nll_per_token(frame).loc["b"].to_dict() == {"completion": 0.5, "reasoning": 0.0, "response": 0.5}


@pytest.mark.parametrize(
    ("text", "kind"), [("Hm.</think>It is Arden fever.", "open"), ("Hm.</think>The answer is B.", "choice")]
)
def test_an_answer_that_was_cut_off_is_wrong_even_if_it_had_named_the_right_one(text, kind):
    assert score(text, kind)["correct"] == 1
    cut = score(text, kind, finish_reason="length")
    assert cut["correct"] == 0 and cut["stopped"] == 0
