"""The statistics of a paired comparison, through scipy and statsmodels, and the verdict they carry.

Items of one group (near duplicates) are not independent: where a group has more than one item, intervals resample whole
groups and the test flips whole groups.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

Verdict = Literal["better", "worse", "cannot tell"]
Interval = tuple[float, float]
ALPHA = 0.05


class Result(BaseModel, extra="forbid", frozen=True):
    """One metric of both models, on the same items. A share is between 0 and 1; the difference is tuned - base."""

    name: str
    label: str = ""
    unit: Literal["share", "nats per token", "tokens", "score", ""] = ""
    higher_is_better: bool
    n: int
    groups: int  # independent units among the n; fewer where items share a group
    base: float
    tuned: float
    base_ci95: Interval
    tuned_ci95: Interval
    difference: float
    ci95: Interval
    test: str
    p_value: float  # two-sided
    p_holm: float | None = None  # corrected over all that is only described; what decides needs none


def show_p(p: float) -> str:
    """A p-value to three digits, `< 0.001` below them: no test gives zero."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927, by statsmodels)."""
    return proportion_confint(successes, n, alpha=ALPHA, method="wilson")


def mcnemar_exact(base: np.ndarray, tuned: np.ndarray) -> float:
    """Exact two-sided McNemar test on two 0/1 vectors of the same items: binomial over the discordant pairs."""
    return float(mcnemar([[0, np.sum(base > tuned)], [np.sum(tuned > base), 0]], exact=True).pvalue)


def group_sums(values: np.ndarray, groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Per group: the sum of its values and its size, in the order of the group names."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index)


def sign_flip_test(differences: np.ndarray, groups: Sequence[str], resamples: int, seed: int) -> float:
    """Two-sided permutation test of a paired difference that swaps the models' values in whole groups (by scipy)."""
    sums, _ = group_sums(differences, groups)
    if len(sums) == 1:
        return 1.0  # a single group can show nothing
    settings = {"permutation_type": "samples", "n_resamples": resamples, "rng": np.random.default_rng(seed)}
    return float(stats.permutation_test((sums,), np.sum, vectorized=True, **settings).pvalue)


def bootstrap_interval(values: np.ndarray, groups: Sequence[str], resamples: int, seed: int) -> Interval:
    """Percentile bootstrap interval of a mean (of paired differences, say), resampling whole groups (by scipy)."""
    sums, sizes = group_sums(values, groups)
    if len(sums) == 1 or np.all(values == values[0]):
        return values.mean(), values.mean()

    def mean(sums, sizes, axis):
        return np.sum(sums, axis=axis) / np.sum(sizes, axis=axis)

    settings = {"n_resamples": resamples, "method": "percentile", "rng": np.random.default_rng(seed)}
    return stats.bootstrap((sums, sizes), mean, paired=True, confidence_level=1 - ALPHA, **settings).confidence_interval


def mean_interval(values: np.ndarray, groups: Sequence[str], resamples: int, seed: int) -> Interval:
    """Interval of one model's mean: Wilson's for 0/1 values of independent items, else the bootstrap over groups."""
    if len(set(groups)) == len(values) and np.isin(values, (0, 1)).all():
        return wilson_interval(int(values.sum()), len(values))
    return bootstrap_interval(values, groups, resamples, seed)


def difference_interval(differences: np.ndarray, groups: Sequence[str], resamples: int, seed: int) -> Interval:
    """Interval of a mean difference of shares: the bootstrap, or Wilson's bound where all changed alike."""
    first = float(differences[0])
    if np.any(differences != first):
        return bootstrap_interval(differences, groups, resamples, seed)
    units = len(set(groups))
    missed = 1 - wilson_interval(units, units)[0]
    return max(-1.0, first - missed), min(1.0, first + missed)


def compare_paired(
    name: str, base: Sequence, tuned: Sequence, groups: Sequence, *, higher_is_better=True, resamples=10_000, seed=0
) -> Result:
    """Two models on the same items in the same order: McNemar's exact test for 0/1 values of independent items, the
    group-wise sign-flip test otherwise. Raises ValueError where they do not pair up or a value is not finite.
    """
    a, b = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    if not len(a) == len(b) == len(groups) > 0:
        raise ValueError(f"{name}: {len(a)} base, {len(b)} tuned values and {len(groups)} groups do not pair up")
    if bad := int((~np.isfinite([a, b])).sum()):
        raise ValueError(f"{name}: {bad} of {2 * len(a)} values are not finite; nothing can be concluded from them")
    units, sampling = len(set(groups)), (groups, resamples, seed)
    binary = np.isin([a, b], (0, 1)).all()
    exact = binary and units == len(a)
    return Result(
        name=name,
        higher_is_better=higher_is_better,
        n=len(a),
        groups=units,
        base=a.mean(),
        tuned=b.mean(),
        base_ci95=mean_interval(a, *sampling),
        tuned_ci95=mean_interval(b, *sampling),
        difference=(b - a).mean(),
        ci95=(difference_interval if binary else bootstrap_interval)(b - a, *sampling),
        test="exact McNemar" if exact else "sign flips by group",
        p_value=mcnemar_exact(a, b) if exact else sign_flip_test(b - a, *sampling),
    )


def verdict(result: Result, p_value: float | None = None) -> Verdict:
    """The interval must exclude zero and the test agree at 5 %; `p_value` replaces the result's own where corrected."""
    low, high = result.ci95
    if (result.p_value if p_value is None else p_value) >= ALPHA or low <= 0 <= high:
        return "cannot tell"
    return "better" if (result.difference > 0) == result.higher_is_better else "worse"


def show_rate(n: int, difference: float, *, asked: float = 0.0, experiments: int = 2000) -> float:
    """The chance that strict and forced accuracy both show a true difference at 5 %, by simulated experiments.

    n independent items. A quarter of them, or as many as the difference needs, one model alone knows; half of the rest
    both know. A share `asked` of each model's answers states no letter: wrong strictly, and right once it is asked for.
    """
    discordant = max(0.25, difference)
    gained, lost, both = (discordant + difference) / 2, (discordant - difference) / 2, (1 - discordant) / 2
    stated, one_stated = 1 - asked, both * asked * (1 - asked)
    cells = [gained * stated, gained * asked, lost * stated, lost * asked, one_stated, one_stated]
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n, [*cells, 1 - sum(cells)], size=experiments).T
    forced, strict = (drawn[0] + drawn[1], drawn[2] + drawn[3]), (drawn[0] + drawn[4], drawn[2] + drawn[5])

    def shows(won: np.ndarray, lost: np.ndarray) -> np.ndarray:
        return (won > lost) & (2 * stats.binom.cdf(lost, won + lost, 0.5) < ALPHA)  # McNemar's exact test

    return float(np.mean(shows(*forced) & shows(*strict)))


def detectable_difference(n: int, metric: str, power: float = 0.8) -> float:
    """The smallest difference, in steps of half a point, that n independent items show with this power, by `show_rate`.

    1.0 where n is too small for any. For multiple choice a tenth of the answers is expected to be asked for a letter.
    """
    asked = 0.1 if metric == "multiple_choice" else 0.0
    steps = np.arange(0.005, 1.0, 0.005)
    return next((float(step) for step in steps if show_rate(n, float(step), asked=asked) >= power), 1.0)
