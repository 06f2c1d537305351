"""Statistics: each figure against scipy or an enumeration, and a verdict that never says more than the interval."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from utils.config import load_config
from utils.evaluation.statistics import (
    ALPHA,
    bootstrap_interval,
    compare_paired,
    detectable_difference,
    mcnemar_exact,
    mean_interval,
    show_rate,
    sign_flip_test,
    verdict,
    wilson_interval,
)
from utils.project import PROFILES, ROOT

EXACT = 1e-9


def names(count: int) -> list[str]:
    """Group names of independent items, in their sorted order."""
    return [f"q{i:04d}" for i in range(count)]


def compare(base, tuned, groups=None, **options):
    groups = groups or names(len(base))
    return compare_paired("metric", base, tuned, groups, resamples=options.pop("resamples", 2000), **options)


def draw(seed: int, count: int, base: float, tuned: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.random(count) < base).astype(float), (rng.random(count) < tuned).astype(float)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (6, 32), (131, 200), (1, 1)])
def test_the_wilson_interval_is_scipys(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=EXACT)


@pytest.mark.parametrize("seed", range(6))
def test_mcnemars_test_is_the_binomial_test_of_the_discordant_pairs(seed):
    base, tuned = draw(seed, 60, 0.4, 0.6)
    won, lost = int(np.sum(tuned > base)), int(np.sum(tuned < base))
    assert mcnemar_exact(base, tuned) == pytest.approx(stats.binomtest(won, won + lost).pvalue, abs=EXACT)
    table = [[np.sum((base == x) & (tuned == y)) for y in (1, 0)] for x in (1, 0)]
    assert mcnemar_exact(base, tuned) == pytest.approx(mcnemar(table, exact=True).pvalue, abs=EXACT)


def test_without_a_discordant_pair_mcnemars_test_says_one():
    assert mcnemar_exact(np.ones(5), np.ones(5)) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_the_sign_flip_test_of_few_items_is_the_full_enumeration(seed):
    differences = np.random.default_rng(seed).normal(0.4, 1, size=9)
    flipped = np.array(list(product((1, -1), repeat=9))) @ differences
    observed = differences.sum()
    tail = min(np.mean(flipped >= observed - 1e-12), np.mean(flipped <= observed + 1e-12))
    assert sign_flip_test(differences, names(9), 10_000, seed) == pytest.approx(min(1, 2 * tail), abs=EXACT)


def test_the_sign_flip_test_of_groups_flips_whole_groups():
    differences = np.random.default_rng(3).normal(0.5, 1, size=24)
    groups = [f"g{i % 8}" for i in range(24)]
    sums = np.array([differences[[i for i in range(24) if i % 8 == g]].sum() for g in range(8)])
    expected = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_test(differences, groups, 10_000, 0) == pytest.approx(expected, abs=EXACT)


def test_the_sign_flip_test_of_many_items_is_near_the_t_test():
    differences = np.random.default_rng(1).normal(0.15, 1, size=150)
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert sign_flip_test(differences, names(150), 10_000, 0) == pytest.approx(expected, abs=0.02)


def test_the_interval_of_independent_items_is_scipys_bootstrap():
    differences = np.random.default_rng(5).normal(0.2, 1, size=40)
    expected = stats.bootstrap(
        (differences,), np.mean, confidence_level=0.95, n_resamples=999, method="percentile",
        rng=np.random.default_rng(11),
    ).confidence_interval  # fmt: skip
    low, high = bootstrap_interval(differences, names(40), 999, 11)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=EXACT)


def test_grouped_items_give_a_wider_interval_than_pretended_independence():
    rng = np.random.default_rng(2)
    differences = np.repeat(rng.normal(0, 1, size=20), 10) + rng.normal(0, 0.1, size=200)
    groups = [f"g{i // 10:02d}" for i in range(200)]
    grouped, pretended = (bootstrap_interval(differences, g, 2000, 0) for g in (groups, names(200)))
    assert np.ptp(grouped) > 2 * np.ptp(pretended)


def test_the_result_does_not_depend_on_the_order_of_the_items():
    base, tuned = draw(4, 80, 0.3, 0.6)
    groups = [f"g{i % 16}" for i in range(80)]
    order = np.random.default_rng(0).permutation(80)
    assert compare(base, tuned, groups) == compare(base[order], tuned[order], [groups[i] for i in order])


def test_independent_shares_get_mcnemar_and_everything_else_sign_flips():
    base, tuned = draw(0, 30, 0.5, 0.5)
    assert compare(base, tuned).test == "exact McNemar"
    assert compare(base, tuned, ["a", "b"] * 15).test == "sign flips by group"
    assert compare(base + 0.5, tuned).test == "sign flips by group"


def test_a_comparison_states_means_difference_and_counts():
    result = compare([0, 0, 1, 1], [1, 0, 1, 1], list("aabb"))
    assert (result.n, result.groups, result.base, result.tuned, result.difference) == (4, 2, 0.5, 0.75, 0.25)


def test_nothing_changed_cannot_be_told_apart():
    base, _ = draw(0, 200, 0.5, 0.5)
    result = compare(base, base)
    missed = 1 - stats.binomtest(200, 200).proportion_ci(method="wilson").low
    assert (result.difference, result.p_value) == (0, 1)
    assert result.ci95 == pytest.approx((-missed, missed), abs=EXACT)  # no change seen is not no change
    assert verdict(result) == "cannot tell"


@pytest.mark.parametrize("grouped", [False, True])
def test_two_arms_of_the_same_quality_are_seldom_told_apart(grouped):
    groups = [f"g{i % 20}" for i in range(100)] if grouped else None
    verdicts = [verdict(compare(*draw(seed, 100, 0.5, 0.5), groups, resamples=500)) for seed in range(40)]
    assert verdicts.count("cannot tell") >= 35


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_clear_effect_is_better_or_worse_by_the_direction_that_the_metric_wants(higher_is_better):
    low, high = draw(1, 200, 0.3, 0.8)
    up = verdict(compare(low, high, higher_is_better=higher_is_better))
    down = verdict(compare(high, low, higher_is_better=higher_is_better))
    assert (up, down) == (("better", "worse") if higher_is_better else ("worse", "better"))


def test_few_pairs_that_all_changed_alike_do_not_claim_certainty():
    result = compare([0] * 8, [1] * 8)
    assert verdict(result) == "better" and result.ci95[0] == pytest.approx(
        stats.binomtest(8, 8).proportion_ci(method="wilson").low
    )
    assert compare([0.5] * 8, [1.5] * 8).ci95 == (1, 1)  # values of a scale, not shares


def test_a_lower_loss_is_better():
    loss = np.random.default_rng(0).normal(2, 0.3, size=50)
    assert verdict(compare(loss, loss - 0.2, higher_is_better=False)) == "better"


def test_one_group_shows_nothing_however_large_its_difference():
    assert verdict(compare([0.0] * 9, [1.0] * 9, ["only"] * 9)) == "cannot tell"


def test_three_items_show_nothing_even_if_all_of_them_changed():
    assert verdict(compare([0, 0, 0], [1, 1, 1])) == "cannot tell"


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_loss_that_is_not_a_number_never_makes_a_model_better(higher_is_better):
    """fp16 can overflow: a diverged model's loss is NaN, and every comparison with NaN is false."""
    base = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    tuned = [*base[:3], float("nan"), *base[4:]]
    try:
        assert verdict(compare(base, tuned, higher_is_better=higher_is_better)) == "cannot tell"
    except ValueError as error:
        assert "metric" in str(error)


@pytest.mark.parametrize(("base", "tuned", "groups"), [([0, 1], [1], list("ab")), ([0], [1], list("ab")), ([], [], [])])
def test_arms_that_do_not_pair_up_are_refused(base, tuned, groups):
    with pytest.raises(ValueError, match="do not pair up"):
        compare_paired("metric", base, tuned, groups)


@settings(deadline=None, max_examples=60)
@given(
    data=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 30)), min_size=1, max_size=40),
    higher_is_better=st.booleans(),
)
def test_the_verdict_is_never_better_or_worse_where_the_interval_holds_zero(data, higher_is_better):
    base, tuned, group = zip(*data, strict=True)
    result = compare(base, tuned, [f"g{g}" for g in group], resamples=200, higher_is_better=higher_is_better)
    low, high = result.ci95
    assert low <= high and 0 <= result.p_value <= 1
    told = verdict(result)
    if low <= 0 <= high or result.p_value >= ALPHA:
        assert told == "cannot tell"
    else:
        assert (told == "better") == ((result.difference > 0) == higher_is_better)


def exact_power(n: int, difference: float, discordant: float) -> float:
    """The chance that exact McNemar on n pairs finds this difference at 5 %, by full enumeration."""
    share, power = (1 + difference / discordant) / 2, 0.0
    for pairs in range(n + 1):
        won = np.arange(pairs + 1)
        p_values = 2 * stats.binom.cdf(np.minimum(won, pairs - won), pairs, 0.5)
        found = stats.binom.pmf(won[p_values < ALPHA], pairs, share).sum()
        power += stats.binom.pmf(pairs, n, discordant) * found
    return power


@pytest.mark.parametrize("n", [30, 200, 600])
@pytest.mark.parametrize("difference", [0.03, 0.08, 0.15])
def test_where_every_answer_states_a_letter_the_rate_is_mcnemars_power(n, difference):
    assert show_rate(n, difference) == pytest.approx(exact_power(n, difference, 0.25), abs=0.04)  # 2,000 experiments


def test_answers_that_state_no_letter_cost_power():
    rates = [show_rate(300, 0.08, asked=asked) for asked in (0.0, 0.1, 0.3, 0.6)]
    assert rates == sorted(rates, reverse=True) and rates[0] - rates[-1] > 0.2


@pytest.mark.parametrize("asked", [0.0, 0.1, 0.5])
def test_without_a_difference_both_show_in_at_most_five_percent(asked):
    assert show_rate(300, 0.0, asked=asked, experiments=20_000) <= 0.025  # one side alone


def test_one_arms_interval_is_wilsons_for_independent_shares_and_by_group_otherwise():
    values, _ = draw(3, 60, 0.4, 0.5)
    wilson = stats.binomtest(int(values.sum()), 60).proportion_ci(method="wilson")
    assert mean_interval(values, names(60), 999, 0) == pytest.approx((wilson.low, wilson.high), abs=EXACT)
    groups = [f"g{i // 10}" for i in range(60)]
    expected = stats.bootstrap(
        (values.reshape(6, 10).sum(axis=1),), np.sum, n_resamples=999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert mean_interval(values, groups, 999, 0) == pytest.approx((expected.low / 60, expected.high / 60), abs=EXACT)


@pytest.mark.parametrize("shape", ["independent shares", "grouped shares", "grouped losses"])
def test_200_null_comparisons_are_significant_as_often_as_five_in_a_hundred(shape):
    """Labels shuffled between the arms, whole groups together: nothing is left to find.

    The share of p < 0.05 must lie inside the 99 % interval around the test's nominal size. (McNemar's exact test is
    discrete: its true size is somewhat below 5 %.)
    """
    rng, found, comparisons = np.random.default_rng(20261121), 0, 200
    groups = names(240) if shape == "independent shares" else [f"g{i // 6:02d}" for i in range(240)]
    _, index = np.unique(groups, return_inverse=True)
    for seed in range(comparisons):
        level = rng.normal(0, 1, size=index.max() + 1)[index]  # items of one group resemble each other
        base, tuned = level + rng.normal(0, 1, size=240), level + rng.normal(0.8, 1, size=240)
        if "shares" in shape:
            base, tuned = (base > 0.4).astype(float), (tuned > 0.4).astype(float)
        swap = rng.random(index.max() + 1)[index] < 0.5
        a, b = np.where(swap, tuned, base), np.where(swap, base, tuned)
        found += compare(a, b, groups, resamples=1000, seed=seed).p_value < ALPHA
    low, high = stats.binom.interval(0.99, comparisons, ALPHA)
    assert low <= found <= high, found


def test_the_detectable_difference_shrinks_with_n_and_grows_with_power_and_with_letters_that_lack():
    values = [detectable_difference(n, "accuracy") for n in (50, 100, 200, 400, 800, 10_000)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.02
    assert detectable_difference(200, "accuracy", power=0.9) > detectable_difference(200, "accuracy")
    assert detectable_difference(300, "multiple_choice") > detectable_difference(300, "accuracy")


@pytest.mark.parametrize(
    ("profile", "words"), [("t4", "{:.0f} points with the 600"), ("t4-quick", "\n{:.0f} with the 100")]
)
def test_what_the_documentation_says_of_a_profile_is_what_00_prints(profile, words):
    rows = load_config(profile).evaluate.benchmark.rows
    points = 100 * detectable_difference(rows, "multiple_choice")
    assert words.format(points) in (ROOT / "docs/measuring.md").read_text(encoding="utf-8") and words.endswith(
        f"the {rows}"
    )
    assert f"{points:.0f} points" in (PROFILES / f"{profile}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("n", [1, 5])
def test_an_n_too_small_to_show_any_difference_promises_none(n):
    """At n = 5 even five wins out of five give p = 0.06."""
    assert detectable_difference(n, "accuracy") == 1.0
