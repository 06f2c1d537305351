"""Words follow from figures: no claim says more than its interval and its corrected p carry."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.evaluation.compare import decide, headline, state_claims
from utils.evaluation.metrics import METRICS
from utils.evaluation.statistics import Result, compare_paired


def result(name: str, base: float, tuned: float, n: int = 300, seed: int = 0) -> Result:
    """A paired result of n independent items: shares by their rates, others as values around their means."""
    rng, metric = np.random.default_rng(seed), METRICS[name]
    if metric.unit == "share":
        arms = [(rng.random(n) < rate).astype(float) for rate in (base, tuned)]
    else:
        noise = rng.normal(0, 0.1, size=n)
        arms = [base + noise, tuned + noise + rng.normal(0, 0.01, size=n)]
    ids = [f"q{i:04d}" for i in range(n)]
    return compare_paired(name, *arms, ids, higher_is_better=metric.higher_is_better, resamples=1000)


def describe(one: Result, p: float | None = None) -> str:
    """The headline of one metric alone."""
    return headline(one.name, {one.name: one}, {} if p is None else {one.name: p})


def claims(*results: Result, **corrected: float) -> dict[str, object]:
    named = {r.name: r for r in results}
    return {c["claim"]: SimpleNamespace(**c) for c in state_claims("accuracy", named, corrected)}


def test_a_clear_gain_is_told_with_n_interval_and_p():
    text = describe(result("multiple_choice", 0.4, 0.7))
    assert text.startswith("On 300 held-out questions, multiple-choice accuracy, strict went from ")
    assert "95 % interval +" in text and "p < 0.001" in text and text.endswith("is better on this metric.")


def test_too_few_questions_say_how_few_they_are():
    assert "cannot tell" in describe(result("accuracy", 0.4, 0.5, n=30))
    assert "only about 26 points or more would show" in describe(result("accuracy", 0.4, 0.4, n=30, seed=1))
    assert "No difference would show with so few." in describe(result("accuracy", 0.4, 0.4, n=4))


def test_each_claim_gets_its_own_words():
    found = claims(
        result("accuracy", 0.2, 0.8), result("reasoning_tokens", 400, 100), result("well_formed", 0.9, 0.3),
        result("nll", 2.0, 1.5),
    )  # fmt: skip
    assert {name: claim.verdict for name, claim in found.items()} == {
        "knows more": "better", "reasons shorter": "better", "keeps form": "worse", "imitates the reference": "better",
    }  # fmt: skip
    assert "answers more questions rightly" in found["knows more"].sentence
    assert "reasoning is shorter" in found["reasons shorter"].sentence
    assert "Fewer of its answers are well formed" in found["keeps form"].sentence
    assert "says nothing about truth" in found["imitates the reference"].sentence


def test_what_was_not_measured_is_not_claimed():
    found = claims(result("nll", 2.0, 1.5))
    assert found["knows more"].verdict == "cannot tell" and found["knows more"].metric is None
    assert found["knows more"].sentence == "Nothing in this run measures it."


def test_a_corrected_p_above_five_percent_takes_the_claim_back():
    found = claims(result("reasoning_tokens", 400, 100), reasoning_tokens=0.2)["reasons shorter"]
    assert found.verdict == "cannot tell" and "p = 0.200 after Holm's correction" in found.sentence


def strict_and_forced(strict: tuple[float, float], forced: tuple[float, float]) -> dict[str, Result]:
    """Both accuracies, base and tuned, and the shares of answers that state an option."""
    rates = {"multiple_choice": strict, "multiple_choice_forced": forced, "parsed": (0.9, 0.4)}
    return {name: result(name, *pair) for name, pair in rates.items()}


def test_a_gain_that_asking_for_the_letter_takes_away_is_no_knowledge():
    """Shorter reasoning is cut off less often: strict accuracy rises though nothing was learnt."""
    found = claims(*strict_and_forced((0.3, 0.6), (0.6, 0.6)).values())["knows more"]
    assert found.verdict == "cannot tell" and "how answers end" in found.sentence
    assert "answers more questions" not in found.sentence
    both = claims(*strict_and_forced((0.3, 0.6), (0.3, 0.6)).values())["knows more"]
    assert both.verdict == "better" and "of the fine-tuned model's state no letter" in both.sentence


@pytest.mark.parametrize(
    ("strict", "forced"), [((0.3, 0.6), (0.6, 0.6)), ((0.3, 0.6), (0.6, 0.3)), ((0.6, 0.3), (0.6, 0.6))]
)
def test_the_headline_says_no_more_than_the_claim_below_it(strict, forced):
    """It said "better" from strict accuracy where the claim said "cannot tell": forced answers disagreed."""
    named = strict_and_forced(strict, forced)
    text = headline("multiple_choice", named, {})
    assert decide("multiple_choice", named, {})[0] == "cannot tell"
    assert "is better" not in text and "is worse" not in text and "how answers end" in text


@pytest.mark.parametrize("primary", ["multiple_choice", "nll"])
def test_strict_and_forced_both_count_at_five_percent_without_a_correction(primary):
    """The intersection-union test: both must be below 5 %, and its error is at most 5 % too, registered or not."""
    named = strict_and_forced((0.3, 0.6), (0.3, 0.6)) | {"nll": result("nll", 2.0, 1.9)}
    assert decide("multiple_choice", named, {"parsed": 0.3})[0] == "better"
    assert "is better on this metric" in headline("multiple_choice", named, {"parsed": 0.3})
    told = {claim["claim"]: claim["verdict"] for claim in state_claims(primary, named, {"parsed": 0.3})}
    assert told["knows more"] == "better"


def test_lengths_that_were_cut_are_told_as_such():
    found = claims(result("reasoning_tokens", 400, 100), result("truncated", 0.5, 0.1))["reasons shorter"]
    assert "were cut off at the limit" in found.sentence
    assert (
        "cut off"
        not in claims(result("reasoning_tokens", 400, 100), result("truncated", 0, 0))["reasons shorter"].sentence
    )


def test_form_that_is_kept_is_told_with_the_loss_that_remains_possible():
    found = claims(result("well_formed", 0.95, 0.95))["keeps form"]
    assert (
        found.verdict == "cannot tell"
        and "a loss of more than" in found.sentence
        and "0.0 points is" not in found.sentence
    )


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(METRICS)), base=st.floats(0.05, 0.95), tuned=st.floats(0.05, 0.95),
    n=st.integers(2, 80), p=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_no_sentence_says_better_or_worse_where_the_interval_holds_zero(name, base, tuned, n, p, seed):
    one = result(name, base, tuned, n, seed)
    low, high = one.ci95
    silent = p >= 0.05 or low <= 0 <= high
    text = describe(one, p)
    assert ("is better on" in text or "is worse on" in text) is not silent
    for claim in state_claims("accuracy", {name: one}, {name: p}):
        if silent:
            assert claim["verdict"] == "cannot tell"


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_can_be_described(name):
    assert METRICS[name].label in describe(result(name, 0.3, 0.6, n=50))


def test_the_headline_says_what_the_claims_say():
    """The model card prints only this sentence."""
    assert "how answers end" in headline("multiple_choice", strict_and_forced((0.3, 0.6), (0.6, 0.6)), {})
    assert "says nothing about truth" in headline("nll", {"nll": result("nll", 2.0, 1.5)}, {})
    both = {r.name: r for r in (result("accuracy", 0.2, 0.8), result("truncated", 0.6, 0.0))}
    assert "were cut off at the limit" in headline("accuracy", both, {"truncated": 0.01})


def test_the_registered_metric_decides_the_claim():
    results = {r.name: r for r in (result("accuracy", 0.5, 0.5), result("multiple_choice", 0.2, 0.8))}
    for primary in results:
        assert {c["claim"]: c["metric"] for c in state_claims(primary, results, {})}["knows more"] == primary
    assert {c["claim"]: c["metric"] for c in state_claims("nll", results, {})}["knows more"] == "multiple_choice"


@pytest.mark.parametrize("name", ["accuracy", "multiple_choice", "nll"])
@pytest.mark.parametrize("tuned", [0.1, 0.9])
def test_claim_and_headline_make_the_same_remark_on_the_same_metric(name, tuned):
    """A claim that could not tell kept silent that losses are imitation, which the headline said."""
    named = strict_and_forced((0.3, 0.3), (0.6, 0.6)) | {
        name: result(name, 0.3, tuned),
        "truncated": result("truncated", 0.6, 0.1),
    }
    corrected = {"truncated": 0.01, "parsed": 0.01}
    remark = decide(name, named, corrected)[1]
    assert headline(name, named, corrected).endswith(remark)
    (claim,) = (claim for claim in state_claims(name, named, corrected) if claim["metric"] == name)
    assert remark and claim["sentence"].endswith(remark)
