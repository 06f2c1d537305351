"""The statistics of a paired comparison, through scipy and statsmodels, and the verdict they carry.

Items of one group (near-duplicates, the demo's questions about one condition) are not independent. Where a group has
more than one item, intervals resample whole groups and the test flips whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

ALPHA = 0.05


def show_p(p: float) -> str:
    """A p-value to three digits, `< 0.001` below them: no test gives zero."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True)
class PairedResult:
    """One metric of both models: means with intervals, difference (tuned - base), its interval, a two-sided p-value."""

    name: str
    n: int
    base: float
    tuned: float
    difference: float
    ci95: tuple[float, float]
    base_ci95: tuple[float, float]
    tuned_ci95: tuple[float, float]
    p_value: float
    groups: int
    test: str
    higher_is_better: bool


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, by statsmodels)."""
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    return float(low), float(high)


def mcnemar_exact(base: np.ndarray, tuned: np.ndarray) -> float:
    """Exact two-sided McNemar test on two 0/1 vectors of the same items: binomial over the discordant pairs."""
    only_base, only_tuned = int(np.sum((base == 1) & (tuned == 0))), int(np.sum((base == 0) & (tuned == 1)))
    table = [[0, only_base], [only_tuned, 0]]
    return float(mcnemar(table, exact=True).pvalue) if only_base + only_tuned else 1.0


def group_sums(values: np.ndarray, groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Per group: the sum of its values and its size, in the order of the group names."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index)


def sign_flip_test(differences: np.ndarray, groups: Sequence[str], resamples: int, seed: int) -> float:
    """Two-sided permutation test of a paired difference that swaps the models' values in whole groups (by scipy)."""
    sums, _ = group_sums(differences, groups)
    if not np.any(sums) or len(sums) == 1:
        return 1.0  # a single group can show nothing
    test = stats.permutation_test(
        (sums,),
        lambda x, axis: np.sum(x, axis=axis),
        permutation_type="samples",
        n_resamples=resamples,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def mean_interval(
    values: np.ndarray, groups: Sequence[str], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Interval of one model's mean: Wilson's for 0/1 values of independent items, else the bootstrap over groups."""
    if len(set(groups)) == len(values) and _is_binary(values):
        return wilson_interval(int(values.sum()), len(values), confidence)
    return bootstrap_interval(values, groups, confidence, resamples, seed)


def difference_interval(
    differences: np.ndarray, groups: Sequence[str], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Interval of the mean paired difference: the bootstrap over groups, except where all shares changed alike.

    Resampling values that are all the same gives no width, which would claim certainty. There Wilson's bound for
    n of n (or none of n) independent units says what could have been missed.
    """
    first = float(differences[0])
    if np.all(differences == first) and first in (-1.0, 0.0, 1.0):
        units = len(set(groups))
        missed = 1 - wilson_interval(units, units, confidence)[0]
        return max(-1.0, first - missed), min(1.0, first + missed)
    return bootstrap_interval(differences, groups, confidence, resamples, seed)


def bootstrap_interval(
    values: np.ndarray, groups: Sequence[str], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (of paired differences, say), resampling whole groups (by scipy)."""
    sums, sizes = group_sums(values, groups)
    if len(sums) == 1 or np.all(values == values[0]):
        return float(values.mean()), float(values.mean())
    result = stats.bootstrap(
        (sums, sizes),
        lambda s, k, axis: np.sum(s, axis=axis) / np.sum(k, axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def compare_paired(
    name: str,
    base: Sequence[float],
    tuned: Sequence[float],
    groups: Sequence[str],
    *,
    higher_is_better: bool = True,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedResult:
    """Compare two models on the same items, in the same order.

    0/1 values of independent items get McNemar's exact test; everything else the group-wise sign-flip test.
    Raises ValueError where the two differ in length, are empty, or hold a value that is not finite.
    """
    a, b = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if len(a) != len(b) or len(a) != len(groups) or len(a) == 0:
        raise ValueError(f"{name}: {len(a)} base, {len(b)} tuned values and {len(groups)} groups do not pair up")
    if bad := int((~np.isfinite([a, b])).sum()):
        raise ValueError(f"{name}: {bad} of {2 * len(a)} values are not finite; nothing can be concluded from them")
    units, sampling = len(set(groups)), (groups, 1 - ALPHA, resamples, seed)
    binary = _is_binary(np.concatenate([a, b]))
    if binary and units == len(a):
        test, p_value = "exact McNemar", mcnemar_exact(a, b)
    else:
        test, p_value = "sign flips by group", sign_flip_test(b - a, groups, resamples, seed)
    return PairedResult(
        name=name,
        n=len(a),
        base=float(a.mean()),
        tuned=float(b.mean()),
        difference=float((b - a).mean()),
        ci95=(difference_interval if binary else bootstrap_interval)(b - a, *sampling),
        base_ci95=mean_interval(a, *sampling),
        tuned_ci95=mean_interval(b, *sampling),
        p_value=p_value,
        groups=units,
        test=test,
        higher_is_better=higher_is_better,
    )


def verdict(result: PairedResult, p_value: float | None = None) -> str:
    """`better`, `worse` or `cannot tell`: the interval must exclude zero and the test agree at 5 %.

    `p_value` replaces the result's own where it was corrected for several tests.
    """
    low, high = result.ci95
    if (result.p_value if p_value is None else p_value) >= ALPHA or low <= 0 <= high:
        return "cannot tell"
    return "better" if (result.difference > 0) == result.higher_is_better else "worse"


def mcnemar_power(n: int, difference: float, discordant: float) -> float:
    """The chance that McNemar's exact test (alpha 5 %) shows a true difference of two paired proportions.

    n independent pairs, of which a share `discordant` differs between the models; exact, by summing over the number of
    discordant pairs and how many of them favour the better one. Raises ValueError where |difference| > discordant.
    """
    if not abs(difference) <= discordant <= 1:
        raise ValueError(
            f"a difference of {difference} needs at least that share of discordant pairs, not {discordant}"
        )
    share = (discordant + abs(difference)) / (2 * discordant) if discordant else 0.5
    counts = np.arange(n + 1)
    # The largest number of losses that still rejects: P(X <= k) <= alpha / 2 under an even chance.
    most = stats.binom.ppf(ALPHA / 2, counts, 0.5) - 1
    most = np.where(stats.binom.cdf(most + 1, counts, 0.5) <= ALPHA / 2, most + 1, most)
    rejects = stats.binom.cdf(most, counts, 1 - share) + stats.binom.sf(counts - most - 1, counts, 1 - share)
    return float(np.sum(stats.binom.pmf(counts, n, discordant) * np.where(most >= 0, rejects, 0.0)))


def detectable_difference(n: int, discordant: float = 0.25, power: float = 0.8) -> float:
    """The smallest difference of two paired proportions that n independent items show with this power (alpha 5 %).

    By `mcnemar_power`, with the given share of discordant pairs, or as many as the difference needs; 1.0 where n is
    too small for any difference.
    """

    def excess(difference: float) -> float:
        return mcnemar_power(n, difference, max(discordant, difference)) - power

    return float(optimize.brentq(excess, 0.0, 1.0, xtol=1e-4)) if excess(1.0) > 0 else 1.0


def _is_binary(values: np.ndarray) -> bool:
    return set(np.unique(values)) <= {0.0, 1.0}
