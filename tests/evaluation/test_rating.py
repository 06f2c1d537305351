"""Blind ratings: the order is balanced and stays, a reader's choices are undone rightly, and a doctored file is refused."""

from __future__ import annotations

import json
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint

from utils.errors import DataError
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.rating import _conclude, digest_pairs, draw_pairs, keep_ratings, state_preference
from utils.pipeline.run_dir import open_run


def evaluations(kinds: dict[str, str], groups: dict[str, str] | None = None) -> tuple[Evaluation, Evaluation]:
    """Both models' answers to questions ({id: kind}), each saying whose it is."""
    scored = pd.DataFrame(
        {"id": [*kinds], "kind": [*kinds.values()], "group": [(groups or {}).get(i, i) for i in kinds]}
    )
    said = ({i: {"text": f"</think>{name} on {i}"} for i in kinds} for name in ("base", "tuned"))
    base, tuned = (Evaluation(answers, {}, scored, pd.DataFrame()) for answers in said)
    return base, tuned


def numbered(n: int, kind: str = "open") -> dict[str, str]:
    return {f"{kind}-{i:03d}": kind for i in range(n)}


@pytest.fixture
def run(tmp_path):
    return open_run("demo", tmp_path / "run")


@pytest.mark.parametrize("n", [1, 2, 49, 100, 150])
def test_each_model_comes_first_equally_often_within_one(run, n):
    pairs = draw_pairs(run, *evaluations(numbered(n)))
    first = Counter(pair.models[0] for pair in pairs)
    assert len({pair.id for pair in pairs}) == len(pairs) == min(n, 100)
    assert abs(first["base"] - first["tuned"]) <= 1


def test_a_pair_holds_each_models_text_in_the_order_of_its_models(run):
    pairs = draw_pairs(run, *evaluations(numbered(60)))
    assert {pair.texts for pair in pairs if pair.models[0] == "tuned"}
    for pair in pairs:
        assert pair.texts == tuple(f"</think>{name} on {pair.id}" for name in pair.models)


def test_the_order_stays_with_its_key_and_another_key_gives_another(run):
    models = evaluations(numbered(60))
    pairs = draw_pairs(run, *models)
    assert draw_pairs(run, *models) == pairs
    run.file("comparison/rating_key.json").unlink()
    others = draw_pairs(run, *models)
    assert [pair.id for pair in others] != [pair.id for pair in pairs]
    assert digest_pairs(others) != digest_pairs(pairs)


def test_open_questions_are_rated_and_multiple_choice_only_where_there_are_no_others(run):
    both = numbered(20) | numbered(30, "choice")
    assert {pair.id for pair in draw_pairs(run, *evaluations(both))} == {*numbered(20)}
    assert {pair.id for pair in draw_pairs(run, *evaluations(numbered(30, "choice")))} == {*numbered(30, "choice")}


def test_one_question_of_each_group_is_rated(run):
    kinds = numbered(40)
    pairs = draw_pairs(run, *evaluations(kinds, {name: f"g{i % 10}" for i, name in enumerate(kinds)}))
    assert len({int(pair.id[-1]) for pair in pairs}) == len(pairs) == 10


def ratings_of(pairs, prefer: list[str]) -> dict:
    """What the page would save of a reader who prefers, pair after pair, that model's answer, or says so."""
    choices = [
        str(pair.models.index(one) + 1) if one in pair.models else one for pair, one in zip(pairs, prefer, strict=False)
    ]
    rated = [{"pair": pair.id, "choice": choice} for pair, choice in zip(pairs, choices, strict=False)]
    return {"page": digest_pairs(pairs), "ratings": rated}


def write(path, value) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_a_readers_choices_are_undone_and_counted(run, tmp_path):
    models = evaluations(numbered(50))
    prefer = ["tuned"] * 25 + ["base"] * 9 + ["equal"] * 4 + ["both bad"] * 2
    write(tmp_path / "r.json", ratings_of(draw_pairs(run, *models), prefer))
    keep_ratings(run, *models, tmp_path / "r.json")
    (claim,) = state_preference(run, *models)
    assert (claim["n"], claim["share"], claim["verdict"]) == (34, 25 / 34, "better")
    assert claim["p_value"] == binomtest(25, 34).pvalue and claim["ci95"] == pytest.approx(
        proportion_confint(25, 34, method="wilson")
    )
    assert "25 of 34 decided pairs (4 equal, 2 both bad, 10 of 50 not rated): 73.5%" in claim["sentence"]


@given(st.integers(0, 100), st.integers(0, 100))
def test_the_verdict_says_no_more_than_interval_and_test(tuned, base):
    claim = _conclude(Counter(tuned=tuned, base=base), 200)
    swapped = _conclude(Counter(tuned=base, base=tuned), 200)
    opposite = {"better": "worse", "worse": "better", "cannot tell": "cannot tell"}
    assert swapped["verdict"] == opposite[claim["verdict"]] and swapped["p_value"] == pytest.approx(claim["p_value"])
    if claim["verdict"] != "cannot tell":
        assert claim["p_value"] < 0.05 and (claim["ci95"][0] > 0.5 or claim["ci95"][1] < 0.5)
        assert (claim["verdict"] == "better") == (tuned > base)


def test_where_no_pair_was_decided_nothing_is_claimed():
    claim = _conclude(Counter({"equal": 7}), 9)
    assert (claim["n"], claim["share"], claim["verdict"], claim["ci95"]) == (0, None, "cannot tell", [0.0, 1.0])
    assert "7 equal, 0 both bad, 2 of 9 not rated" in claim["sentence"]


def doctor(kind: str, good: dict) -> object:
    ratings = good["ratings"]
    return {
        "no JSON": "{'page': 1}",
        "not UTF-8 nor short": "[" * 100_000,
        "no object": [good],
        "without ratings": {"page": good["page"]},
        "of another run": good | {"page": "0" * 16},
        "with an unknown pair": good | {"ratings": [*ratings, {"pair": "nobody", "choice": "1"}]},
        "with a pair twice": good | {"ratings": [*ratings, ratings[3]]},
        "with a side that is none": good | {"ratings": [{"pair": ratings[0]["pair"], "choice": "tuned"}]},
        "with a side as a number": good | {"ratings": [{"pair": ratings[0]["pair"], "choice": 1}]},
        "with more than was asked": good | {"models": ["base", "tuned"]},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("no JSON", "Invalid JSON"),
        ("not UTF-8 nor short", "Invalid JSON"),
        ("no object", "the file: Input should be an object"),
        ("without ratings", "ratings: Field required"),
        ("of another run", "rates other answers than this run's (page 0000000000000000, not "),
        ("with an unknown pair", "rates 'nobody', which is none of the 12 pairs"),
        ("with a pair twice", "2 times, not once"),
        ("with a side that is none", "ratings.0.choice: Input should be '1', '2', 'equal' or 'both bad'"),
        ("with a side as a number", "ratings.0.choice: Input should be '1', '2', 'equal' or 'both bad'"),
        ("with more than was asked", "models: Extra inputs are not permitted"),
    ],
)
def test_a_doctored_file_gets_a_sentence_and_changes_nothing(run, tmp_path, kind, told):
    models = evaluations(numbered(12))
    good = ratings_of(draw_pairs(run, *models), ["tuned"] * 12)
    write(tmp_path / "r.json", good)
    keep_ratings(run, *models, tmp_path / "r.json")
    before = state_preference(run, *models)
    write(tmp_path / "r.json", doctor(kind, good))
    with pytest.raises(DataError) as error:
        keep_ratings(run, *models, tmp_path / "r.json")
    assert told in str(error.value) and "save the ratings again in this run's comparison/rate.html" in str(error.value)
    assert state_preference(run, *models) == before != []


def test_a_file_that_is_not_there_gets_a_sentence(run, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.json cannot be read .*; save the ratings again in"):
        keep_ratings(run, *evaluations(numbered(3)), tmp_path / "nowhere.json")


def test_ratings_of_earlier_answers_carry_no_claim_and_stop_nothing(run, tmp_path, capsys):
    base, tuned = evaluations(numbered(12))
    write(tmp_path / "r.json", ratings_of(draw_pairs(run, base, tuned), ["tuned"] * 12))
    keep_ratings(run, base, tuned, tmp_path / "r.json")
    assert len(state_preference(run, base, tuned)) == 1
    tuned.answers["open-004"]["text"] = "</think>another answer"
    assert state_preference(run, base, tuned) == []
    assert "No reader's preference is stated: " in capsys.readouterr().out
