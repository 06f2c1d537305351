"""Both models side by side, from files alone: paired figures, the claims they carry, the verdict in words."""

from collections.abc import Iterator, Mapping

import pandas as pd
from statsmodels.stats.multitest import multipletests

from utils.errors import RunDirError
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.metrics import find_metric
from utils.evaluation.statistics import Result, Verdict, compare_paired, detectable_difference, show_p, verdict
from utils.files import atomic, read_json, write_json
from utils.pipeline.run_dir import RunDir

_LATE = " What was measured was changed after answers existed, so this is no registered result."
_OF_CHOICES = {"multiple_choice": "correct", "multiple_choice_forced": "forced", "parsed": "parsed"}
# Both must show at 5 % before more is known: an intersection-union test, whose error is at most 5 % without a correction.
_OF_KNOWLEDGE = ("multiple_choice", "multiple_choice_forced")
_OF_LOSS = {"nll": "completion", "nll_reasoning": "reasoning", "nll_response": "response"}
_OF_ANSWERS = ("well_formed", "one_paragraph", "bullets", "truncated", "reasoning_tokens", "answer_tokens")
_CLAIMS = {  # {claim: its words for better and for worse}, beside the metrics that could decide it
    "knows more": ("It answers more questions rightly.", "It answers fewer questions rightly."),
    "reasons shorter": ("Its reasoning is shorter.", "Its reasoning is longer."),
    "keeps form": ("More of its answers are well formed.", "Fewer of its answers are well formed."),
    "imitates the reference": ("The references surprise it less.", "They surprise it more."),
}
_DECIDED_BY = (("multiple_choice", "accuracy"), ("reasoning_tokens",), ("well_formed",), ("nll",))
# What an answer without its end means for a metric.
_CUT_OFF = {"accuracy": ", which counts as wrong", "reasoning_tokens": "; their full length is unknown"}


def compare_models(run: RunDir, base: Evaluation, tuned: Evaluation) -> dict:
    """Everything of metrics.json; Holm's correction is over what is only described.

    Raises RunDirError where rows differ, or the data lack the primary metric.
    """
    if list(base.loss.index) != list(tuned.loss.index):
        raise RunDirError("baseline/nll.parquet and tuned/nll.parquet hold different rows; run 01 and 04 again.")
    evaluate, results = run.config.evaluate, {}
    for name, before, after, groups in _pair_values(base, tuned):
        metric, sampling = find_metric(name), {"resamples": evaluate.resamples, "seed": evaluate.seed}
        result = compare_paired(name, before, after, groups, higher_is_better=metric.higher_is_better, **sampling)
        results[name] = result.model_copy(update={"label": metric.label, "unit": metric.unit})
    name = evaluate.primary
    if name not in results:
        raise RunDirError(f"evaluate.primary is {name}, but this run's data offer only {', '.join(results)}.")
    secondary = [result for key, result in results.items() if key != name]
    described = [result for result in secondary if result.name not in _OF_KNOWLEDGE]
    adjusted = multipletests([r.p_value for r in described], method="holm")[1] if described else []
    corrected = {r.name: float(p) for r, p in zip(described, adjusted, strict=True)}
    split, registration = (read_json(run.file(f"data/{name}.json")) for name in ("split", "registration"))
    return {
        "profile": run.config.profile,
        "benchmarks": list(base.benchmarks),  # the first one's metrics carry no name after a colon
        "primary": results[name].model_dump(mode="json"),
        "secondary": [{**r.model_dump(mode="json"), "p_holm": corrected.get(r.name)} for r in secondary],
        "nll_rows_left_out": base.left_out,  # longer than model.max_seq_length: in no loss, of neither model
        "contamination": split.get("contamination", {}),
        "registration": registration,
        "claims": state_claims(name, results, corrected),
        "verdict": decide(name, results, corrected)[0],
        "sentence": headline(name, results, corrected) + _LATE * registration["changed_after_answers"],
    }


def _pair_values(base: Evaluation, tuned: Evaluation) -> Iterator[tuple[str, pd.Series, pd.Series, list[str]]]:
    """(metric, base's values, tuned's values, groups) of every metric that both models carry."""
    scored = base.scored

    def pair(name: str, column: str, rows: pd.Series | slice = slice(None)):
        return name, scored[rows][column], tuned.scored[rows][column], list(scored[rows]["group"])

    checkable = (scored["kind"] == "open") & scored["correct"].notna()
    if checkable.any():
        yield pair("accuracy", "correct", checkable)
    for benchmark in base.benchmarks:
        for name, column in _OF_CHOICES.items():
            # The first one named carries the registered name, whatever the others are called and their ids look like.
            full_name = name if benchmark == base.benchmarks[0] else f"{name}:{benchmark}"
            yield pair(full_name, column, (scored["kind"] == "choice") & (scored["benchmark"] == benchmark))
    if base.letters is not None and tuned.letters is not None:
        yield "letter_logprobs", base.letters["correct"], tuned.letters["correct"], list(base.letters["group"])
    if len(base.loss):
        for name, column in _OF_LOSS.items():
            yield name, base.loss[column], tuned.loss[column], list(base.loss["group"])
    for name in _OF_ANSWERS:
        yield pair(name, name)
    if "rouge_l" in scored and (worded := scored["rouge_l"].notna()).any():
        yield pair("rouge_l", "rouge_l", worded)


def write_comparison(run: RunDir, metrics: dict) -> pd.DataFrame:
    """comparison/metrics.json and comparison/table.csv; returns the table (one row for each metric, primary first)."""
    table = pd.DataFrame([metrics["primary"], *metrics["secondary"]]).rename(columns={"label": "metric"})
    table["p"] = table["p_holm"].astype(float).fillna(table["p_value"])
    table[["ci_low", "ci_high"]] = table["ci95"].tolist()
    table = table[["metric", "n", "base", "tuned", "difference", "ci_low", "ci_high", "p"]]
    write_json(run.file("comparison/metrics.json"), metrics)
    with atomic(run.file("comparison/table.csv")) as scratch:
        table.to_csv(scratch, index=False)
    return table


def headline(name: str, results: Mapping[str, Result], corrected: Mapping[str, float]) -> str:
    """The primary metric's figures, the verdict, and what has to be said in the same breath."""
    found, remark = decide(name, results, corrected)
    return " ".join(part for part in (_figures(results[name]), _conclusion(results[name], found), remark) if part)


def decide(name: str, results: Mapping[str, Result], corrected: Mapping[str, float]) -> tuple[Verdict, str]:
    """(verdict, remark) for headline and claims: what may be said, and what has to be said in the same breath.

    Strict accuracy also rises where answers come to their end more often, and falls where they state fewer letters, so
    forced accuracy must agree before more or less is known.
    """
    found = verdict(results[name], corrected.get(name))
    forced, parsed, truncated = (results.get(other) for other in ("multiple_choice_forced", "parsed", "truncated"))
    if name == "multiple_choice" and forced and parsed:
        asked = f"{1 - parsed.base:.0%} of the base's answers and {1 - parsed.tuned:.0%} of the fine-tuned model's state no letter"
        if found == verdict(forced):
            return found, f"{asked} and were asked for it: forced accuracy says the same." * (found != "cannot tell")
        low, high = forced.ci95
        return "cannot tell", (
            f"{asked}; asked for it, the difference is {100 * forced.difference:+.1f} points (95 % interval {100 * low:+.1f} to "
            f"{100 * high:+.1f}): what changed may be how answers end, not what is known."
        )
    if name.startswith("nll"):
        return found, "The loss measures imitation of the references, and says nothing about truth."
    if name in _CUT_OFF and truncated and truncated.base + truncated.tuned > 0:
        return found, (
            f"Of the base's answers {truncated.base:.0%} were cut off at the limit, of the fine-tuned "
            f"{truncated.tuned:.0%}{_CUT_OFF[name]}."
        )
    return found, ""


def _figures(result: Result, p_value: float | None = None) -> str:
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
    shown = show_p(result.p_value if p_value is None else p_value)
    p = f"p {shown}" if shown.startswith("<") else f"p = {shown}"
    corrected = "" if p_value is None else " after Holm's correction"
    grouped = f" in {result.groups} groups" if result.groups < result.n else ""
    return f"On {result.n} held-out questions{grouped}, {values}: {change}, {p}{corrected}."


def _conclusion(result: Result, found: Verdict) -> str:
    if found != "cannot tell":
        return f"The fine-tuned model is {found} on this metric."
    told = "This cannot tell the two apart."
    # For groups the interval says it; and where it was forced accuracy that took a verdict back, power is not what lacks.
    if find_metric(result.name).unit != "share" or result.groups < result.n or verdict(result) != "cannot tell":
        return told
    points = 100 * detectable_difference(result.n, result.name)
    if points == 100:
        return f"{told} No difference would show with so few."
    return f"{told} With this many, only about {points:.0f} points or more would show."


def state_claims(primary: str, results: Mapping[str, Result], corrected: Mapping[str, float]) -> list[dict]:
    """What people would like to say; where two metrics could decide, the primary one does."""
    claims = []
    for (claim, (better, worse)), names in zip(_CLAIMS.items(), _DECIDED_BY, strict=True):
        name = min((name for name in names if name in results), key=lambda name: name != primary, default=None)
        if name is None:
            words = "Nothing in this run measures it."
            claims.append({"claim": claim, "metric": None, "verdict": "cannot tell", "sentence": words})
            continue
        result, (found, remark) = results[name], decide(name, results, corrected)
        words = {"better": better, "worse": worse}.get(found) or _conclusion(result, found)
        if claim == "keeps form" and found == "cannot tell" and (low := result.ci95[0]) < 0:
            words = f"Whether it changed cannot be told; a loss of more than {-100 * low:.1f} points is unlikely."
        sentence = " ".join(part for part in (_figures(result, corrected.get(name)), words, remark) if part)
        claims.append({"claim": claim, "metric": name, "verdict": found, "sentence": sentence})
    return claims
