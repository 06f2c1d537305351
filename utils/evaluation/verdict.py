"""The verdict in words, derived from the statistics: better, worse or cannot tell, never more than the interval carries."""

from __future__ import annotations

from collections.abc import Mapping

from utils.evaluation.metrics import find_metric
from utils.evaluation.results import Claim
from utils.evaluation.statistics import PairedResult, detectable_difference, show_p, verdict

_CLAIMS = {
    "knows more": ("multiple_choice", "accuracy"),  # the one that is registered comes first, see `state_claims`
    "reasons shorter": ("reasoning_tokens",),
    "keeps form": ("well_formed",),
    "imitates the reference": ("nll",),
}
_WORDS = {
    "knows more": ("It answers more questions rightly.", "It answers fewer questions rightly."),
    "reasons shorter": ("Its reasoning is shorter.", "Its reasoning is longer."),
    "keeps form": ("More of its answers are well formed.", "Fewer of its answers are well formed."),
    "imitates the reference": ("The references surprise it less: it writes more like them.", "They surprise it more."),
}
# What an answer without its end means for a metric.
_CUT_OFF = {"accuracy": ", which counts as wrong", "reasoning_tokens": "; their full length is unknown"}


def headline(name: str, results: Mapping[str, PairedResult], corrected: Mapping[str, float]) -> str:
    """The primary metric's figures, the verdict, and what has to be said in the same breath."""
    found, remark = decide(name, results, corrected)
    return " ".join(part for part in (_figures(results[name]), _conclusion(results[name], found), remark) if part)


def decide(name: str, results: Mapping[str, PairedResult], corrected: Mapping[str, float]) -> tuple[str, str]:
    """(verdict, remark): what may be said of this metric, and what has to be said wherever it is named.

    It is the one rule, for the headline and the claims alike. Multiple choice needs strict and forced accuracy to agree.
    """
    found = verdict(results[name], corrected.get(name))
    if name == "multiple_choice" and found != "cannot tell":
        return _check_forced(found, results, corrected)
    if name.startswith("nll"):
        return found, "The loss measures imitation of the references, and says nothing about truth."
    if name in _CUT_OFF and "truncated" in results:
        return found, _cut_off(results["truncated"], _CUT_OFF[name])
    return found, ""


def _figures(result: PairedResult, p_value: float | None = None) -> str:
    metric = find_metric(result.name)
    low, high = result.ci95
    if metric.unit == "share":
        values = f"{metric.label} went from {result.base:.1%} to {result.tuned:.1%}"
        change = f"{100 * result.difference:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    else:
        digits = 1 if metric.unit == "tokens" else 3
        unit = "" if metric.unit == "score" else f" {metric.unit}"
        values = f"{metric.label} went from {result.base:.{digits}f} to {result.tuned:.{digits}f}{unit}"
        change = f"{result.difference:+.{digits}f} (95 % interval {low:+.{digits}f} to {high:+.{digits}f})"
    p = result.p_value if p_value is None else p_value
    corrected = "" if p_value is None else " after Holm's correction"
    shown = show_p(p)
    words = f"p {shown}" if shown.startswith("<") else f"p = {shown}"
    grouped = f" in {result.groups} groups" if result.groups < result.n else ""
    return f"On {result.n} held-out questions{grouped}, {values}: {change}, {words}{corrected}."


def _conclusion(result: PairedResult, found: str) -> str:
    if found != "cannot tell":
        return f"The fine-tuned model is {found} on this metric."
    hint = ""
    shows = verdict(result) != "cannot tell"  # it was forced accuracy that took it back: power is not what lacks
    if (
        find_metric(result.name).unit == "share" and result.groups == result.n and not shows
    ):  # the interval says it for groups
        smallest = detectable_difference(result.groups)
        hint = (
            " No difference would show with so few."
            if smallest == 1
            else f" With this many, only about {100 * smallest:.0f} points or more would show."
        )
    return f"This cannot tell the two apart.{hint}"


def state_claims(results: Mapping[str, PairedResult], corrected: Mapping[str, float]) -> list[Claim]:
    """One entry for each thing that people would like to say; `corrected` holds Holm's p for secondary metrics.

    Where two metrics could decide, the primary one does: it is the one without a corrected p.
    """
    primary_first = {claim: sorted(names, key=lambda name: name in corrected) for claim, names in _CLAIMS.items()}
    return [_state(claim, names, results, corrected) for claim, names in primary_first.items()]


def _state(claim: str, names, results: Mapping[str, PairedResult], corrected: Mapping[str, float]) -> Claim:
    result = next((results[name] for name in names if name in results), None)
    if result is None:
        text = "Nothing in this run measures it."
        return Claim(claim=claim, metric=None, verdict="cannot tell", sentence=text)
    p_value = corrected.get(result.name)
    found, remark = decide(result.name, results, corrected)
    words = _WORDS[claim][found == "worse"] if found != "cannot tell" else _conclusion(result, found)
    if claim == "keeps form" and found == "cannot tell":
        low = result.ci95[0]
        words = f"No change is certain; a loss of more than {-100 * low:.1f} points is unlikely." if low < 0 else ""
    sentence = " ".join(part for part in (_figures(result, p_value), words, remark) if part)
    return Claim(claim=claim, metric=result.name, verdict=found, sentence=sentence)


def _check_forced(found: str, results: Mapping[str, PairedResult], corrected: Mapping[str, float]) -> tuple[str, str]:
    """Shorter reasoning runs into the limit less often, and strict accuracy rises without any knowledge gained.

    So both must hold at 5 %; where the metric is registered, without a correction (an intersection-union test).
    """
    forced = results.get("multiple_choice_forced")
    registered = "multiple_choice" not in corrected
    if forced is None or verdict(forced, None if registered else corrected.get(forced.name)) == found:
        return found, ""
    low, high = forced.ci95
    return "cannot tell", (
        f"Where answers that were cut off are closed and a letter is read, the difference is {100 * forced.difference:+.1f} "
        f"points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}): what changed may be how often an answer ends in "
        "time, not what is known."
    )


def _cut_off(truncated: PairedResult, consequence: str) -> str:
    if truncated.base == truncated.tuned == 0:
        return ""
    return (
        f"Of the base's answers {truncated.base:.0%} were cut off at the limit, of the fine-tuned {truncated.tuned:.0%}"
        f"{consequence}."
    )
