"""The comparison of both models: one documented schema, Holm over what is only described, and every case counted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from utils.errors import RunDirError
from utils.evaluation.compare import compare_models, write_comparison
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.metrics import loss_per_token, score_answers
from utils.evaluation.questions import Question, register
from utils.files import write_json
from utils.pipeline.run_dir import RunDir, open_run

LETTERS = {"A": "one", "B": "two", "C": "three", "D": "four"}
CONTAMINATION = {"threshold": 0.5, "near_benchmark": 2, "largest_cosine_train_eval": 0.41}


def evaluations(n: int = 60, open_rows: int = 10, gain: float = 0.3, seed: int = 0) -> list[Evaluation]:
    """Answers of both models to n multiple-choice items of two benchmarks and a few open questions, and losses."""
    rng = np.random.default_rng(seed)
    items = pd.DataFrame(
        {"id": [f"i{k:03d}" for k in range(n)], "options": [LETTERS] * n, "gold": rng.choice(list("ABCD"), n),
         "benchmark": ["medqa"] * (n - n // 3) + ["pubmedqa"] * (n // 3)}
    )  # fmt: skip
    held_out = pd.DataFrame({"id": [f"q{k:03d}" for k in range(open_rows)]})
    frames = []
    for rate in (0.3, 0.3 + gain):
        answers = {}
        for row in items.itertuples():
            letter = row.gold if rng.random() < rate else "A"
            cut = rng.random() < 0.2
            text = "Hm" if cut else f"Hm.</think>The answer is {letter}."
            answers[row.id] = {"kind": "choice", "text": text, "finish_reason": "length" if cut else "stop",
                               "tokens": int(rng.integers(40, 90)), "reasoning_tokens": 30}  # fmt: skip
        for name in held_out["id"]:
            answers[name] = {
                "kind": "open",
                "text": "Hm.</think>So.",
                "finish_reason": "stop",
                "tokens": 9,
                "reasoning_tokens": 4,
            }
        frames.append(score_answers(answers, held_out, items, {i: "B" for i in items["id"]}))
    losses = []
    for shift in (0.0, -0.2):
        sums = rng.normal(60 + 30 * shift, 2, size=open_rows)
        losses.append(loss_per_token(pd.DataFrame(
            {"id": held_out["id"], "reasoning_nll": sums, "response_nll": sums, "reasoning_tokens": 30, "response_tokens": 30}
        )))  # fmt: skip
    losses = [loss.assign(group=loss.index) for loss in losses]
    named = {"benchmarks": ("medqa", "pubmedqa")}
    return [Evaluation({}, {}, scored, loss, **named) for scored, loss in zip(frames, losses, strict=True)]


@pytest.fixture
def run(tmp_path) -> RunDir:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    settings = {"data.path": str(rows), "evaluate.benchmark.path": str(rows), "evaluate.resamples": 1000}
    run = open_run("demo", tmp_path / "run", settings)
    write_json(run.file("data/split.json"), {"contamination": CONTAMINATION})
    register(run, [Question("a", "open", "?")], [])
    return run


def test_the_file_is_json_and_holds_what_the_design_asks_for(run):
    metrics = compare_models(run, *evaluations())
    assert metrics == json.loads(json.dumps(metrics, allow_nan=False))
    assert set(metrics) >= {"primary", "secondary", "contamination", "registration", "verdict", "sentence", "claims"}
    for result in (metrics["primary"], *metrics["secondary"]):
        assert set(result) >= {"name", "n", "base", "tuned", "difference", "ci95", "p_value"}
        assert result["ci95"][0] <= result["difference"] <= result["ci95"][1]
        assert result["base_ci95"][0] <= result["base"] <= result["base_ci95"][1]
    assert metrics["contamination"] == CONTAMINATION
    names = [result["name"] for result in metrics["secondary"]]
    assert metrics["primary"]["name"] == "multiple_choice" and metrics["primary"]["n"] == 40
    assert {"multiple_choice_forced", "parsed", "truncated", "nll", "nll_reasoning", "nll_response", "well_formed", "bullets",
            "one_paragraph", "reasoning_tokens", "answer_tokens", "multiple_choice:pubmedqa"} <= set(names)  # fmt: skip


def test_near_duplicates_of_the_letter_probe_are_resampled_together(run):
    letters = pd.DataFrame({"id": [f"p{k}" for k in range(40)], "group": [f"p{k // 4}" for k in range(40)]})
    both = [replace(one, letters=letters.assign(correct=[k % 3 > number for k in range(40)]))
            for number, one in enumerate(evaluations())]  # fmt: skip
    found = {result["name"]: result for result in compare_models(run, *both)["secondary"]}["letter_logprobs"]
    assert (found["n"], found["groups"]) == (40, 10)


def test_holms_correction_is_statsmodels_over_what_is_only_described(run):
    """Strict and forced accuracy decide whether more is known: both at 5 %, neither corrected."""
    secondary = {r["name"]: r for r in compare_models(run, *evaluations())["secondary"]}
    assert secondary.pop("multiple_choice_forced")["p_holm"] is None
    expected = multipletests([r["p_value"] for r in secondary.values()], method="holm")[1]
    assert [r["p_holm"] for r in secondary.values()] == pytest.approx(list(expected), abs=1e-9)


def test_an_answer_that_was_cut_off_stays_in_n_and_counts_as_wrong(run):
    base, tuned = evaluations()
    metrics = compare_models(run, base, tuned)
    mine = base.scored[(base.scored["kind"] == "choice") & (base.scored["benchmark"] == "medqa")]
    assert metrics["primary"]["n"] == len(mine) == 40 and mine["truncated"].sum() > 0
    assert mine.loc[mine["truncated"] == 1, "correct"].sum() == 0
    assert metrics["primary"]["base"] == pytest.approx(mine["correct"].mean())


def test_held_out_rows_without_a_loss_are_counted(run):
    assert compare_models(run, *evaluations())["nll_rows_left_out"] == 0
    shorter = [replace(one, loss=one.loss[3:], left_out=3) for one in evaluations()]
    metrics = compare_models(run, *shorter)
    assert metrics["nll_rows_left_out"] == 3
    assert next(r["n"] for r in metrics["secondary"] if r["name"] == "nll") == 7
    base, tuned = evaluations()
    with pytest.raises(RunDirError, match="hold different rows"):
        compare_models(run, base, replace(tuned, loss=tuned.loss[1:]))


def test_a_registration_changed_after_answers_is_said_in_the_sentence(run):
    registration = json.loads(run.file("data/registration.json").read_text())
    write_json(run.file("data/registration.json"), {**registration, "changed_after_answers": True})
    metrics = compare_models(run, *evaluations())
    assert metrics["registration"]["changed_after_answers"] is True
    assert metrics["sentence"].endswith("so this is no registered result.")


def test_a_primary_that_the_data_cannot_carry_is_a_sentence(run):
    only = [replace(one, scored=one.scored[one.scored["kind"] == "open"], benchmarks=()) for one in evaluations()]
    with pytest.raises(RunDirError, match=r"evaluate.primary is multiple_choice, but"):
        compare_models(run, *only)


def test_shuffled_labels_never_make_the_verdict_swing_one_way_only(run):
    """Swap the models at random, many times: what is found is found in both directions, and seldom."""
    base, tuned = evaluations(n=90, open_rows=2, gain=0.3)
    rng, verdicts = np.random.default_rng(5), []
    for _ in range(10):
        swap = pd.Series(rng.random(len(base.scored)) < 0.5)
        one = replace(base, scored=tuned.scored.where(swap, base.scored))
        other = replace(tuned, scored=base.scored.where(swap, tuned.scored))
        verdicts.append(compare_models(run, one, other)["verdict"])
    assert verdicts.count("cannot tell") >= 8


def test_the_table_has_the_primary_first_and_corrected_p_values_below(run):
    metrics = compare_models(run, *evaluations())
    table = write_comparison(run, metrics)
    assert table["metric"].iloc[0] == "multiple-choice accuracy, strict" and len(table) == 1 + len(metrics["secondary"])
    assert list(table["p"][1:]) == [r["p_holm"] or r["p_value"] for r in metrics["secondary"]]
    assert json.loads(run.file("comparison/metrics.json").read_text()) == metrics


def test_the_primary_metric_is_of_the_benchmark_that_is_named_first_whatever_its_ids_sort_like(run):
    """Profile full registers MedQA; MedMCQA's ids sort first, and its figures stood under the registered name."""
    swapped = [replace(one, benchmarks=("pubmedqa", "medqa")) for one in evaluations()]
    metrics = compare_models(run, *swapped)
    assert metrics["primary"]["name"] == "multiple_choice" and metrics["primary"]["n"] == 20
    assert metrics["benchmarks"] == ["pubmedqa", "medqa"]
    assert next(r["n"] for r in metrics["secondary"] if r["name"] == "multiple_choice:medqa") == 40
