"""Both models side by side: paired figures, the claims they carry, and their table, from files alone (no torch)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import pandas as pd
from statsmodels.stats.multitest import multipletests

from utils.errors import StageOrderError
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.metrics import find_metric
from utils.evaluation.results import Comparison
from utils.evaluation.statistics import PairedResult, compare_paired
from utils.evaluation.verdict import decide, headline, state_claims
from utils.files import atomic, write_json
from utils.pipeline.run_dir import RunDir

_LATE = " What was measured was changed after answers existed, so this is no registered result."
_OF_CHOICES = {"multiple_choice": "correct", "multiple_choice_forced": "forced", "parsed": "parsed"}
_OF_LOSS = {"nll": "completion", "nll_reasoning": "reasoning", "nll_response": "response"}
_OF_ANSWERS = ("well_formed", "one_paragraph", "bullets", "truncated", "reasoning_tokens", "answer_tokens")
_FORM = ("well_formed", "one_paragraph", "bullets", "stopped", "parsed")


def compare_models(run: RunDir, base: Evaluation, tuned: Evaluation) -> dict:
    """Everything of metrics.json (schema: `results.Comparison`): the registered primary metric, secondary ones with
    Holm's correction, the claims, the verdict.

    Raises StageOrderError where the two hold other rows, or the data cannot carry the primary metric.
    """
    if list(base.loss.index) != list(tuned.loss.index):
        raise StageOrderError("baseline/nll.parquet and tuned/nll.parquet hold different rows; run 01 and 04 again.")
    results = {result.name: result for result in pair_metrics(run, base, tuned)}
    name = run.config.evaluate.primary
    if name not in results:
        raise StageOrderError(
            f"evaluate.primary is {name}, but this run's data cannot carry it; it offers {', '.join(results)}."
        )
    secondary = [result for key, result in results.items() if key != name]
    adjusted = multipletests([r.p_value for r in secondary], method="holm")[1] if secondary else []
    corrected = {r.name: float(p) for r, p in zip(secondary, adjusted, strict=True)}
    registration = _read(run, "data/registration.json")
    sentence = headline(name, results, corrected)
    models = {"base": base.scored, "tuned": tuned.scored}
    return Comparison(
        profile=run.config.profile,
        benchmarks=list(base.benchmarks),
        primary=_entry(results[name], None),
        secondary=[_entry(result, corrected[result.name]) for result in secondary],
        form={which: _form(scored) for which, scored in models.items() if len(scored)},
        length={which: _lengths(scored) for which, scored in models.items() if len(scored)},
        nll_rows_left_out=base.left_out,
        contamination=_read(run, "data/split.json").get("contamination", {}),
        registration=registration,
        claims=state_claims(results, corrected),
        verdict=decide(name, results, corrected)[0],
        sentence=sentence + _LATE if registration["changed_after_answers"] else sentence,
    ).model_dump(mode="json")


def _read(run: RunDir, name: str) -> dict:
    return json.loads(run.file(name).read_text(encoding="utf-8"))


def _entry(result: PairedResult, p_holm: float | None) -> dict:
    metric = find_metric(result.name)
    return {**asdict(result), "label": metric.label, "unit": metric.unit, "p_holm": p_holm}


def pair_metrics(run: RunDir, base: Evaluation, tuned: Evaluation) -> list[PairedResult]:
    """Every metric that both models carry, compared pair by pair."""
    evaluate = run.config.evaluate

    def pair(name: str, before: pd.Series, after: pd.Series, groups: Sequence[str]) -> PairedResult:
        better = find_metric(name).higher_is_better
        settings = {"resamples": evaluate.resamples, "seed": evaluate.seed}
        return compare_paired(name, before, after, list(groups), higher_is_better=better, **settings)

    def pair_rows(name: str, column: str, rows: pd.Series) -> PairedResult:
        return pair(name, base.scored[rows][column], tuned.scored[rows][column], base.scored[rows]["group"])

    results = [pair_rows(*chosen) for chosen in _choose_answers(base)]
    if base.letters is not None and tuned.letters is not None:
        before, after = base.letters["correct"].astype(float), tuned.letters["correct"].astype(float)
        results.append(pair("letter_logprobs", before, after, base.letters["id"]))
    if len(base.loss):
        for name, column in _OF_LOSS.items():
            results.append(pair(name, base.loss[column], tuned.loss[column], base.loss["group"]))
    if len(base.scored):
        results += [pair_rows(name, name, base.scored["id"].notna()) for name in _OF_ANSWERS]
    if "rouge_l" in base.scored and (worded := base.scored["rouge_l"].notna()).any():
        results.append(pair_rows("rouge_l", "rouge_l", worded))
    return results


def _choose_answers(base: Evaluation) -> Iterator[tuple[str, str, pd.Series]]:
    """(metric, column, rows) of the scored answers that are right or wrong."""
    scored = base.scored
    checkable = (scored["kind"] == "open") & scored["correct"].notna()
    if checkable.any():
        yield "accuracy", "correct", checkable
    for benchmark in base.benchmarks:
        rows = (scored["kind"] == "choice") & (scored["benchmark"] == benchmark)
        for name, column in _OF_CHOICES.items():
            # The first one named carries the registered name, whatever the others are called and their ids look like.
            yield name if benchmark == base.benchmarks[0] else f"{name}:{benchmark}", column, rows


def _form(scored: pd.DataFrame) -> dict[str, float]:
    return {name: float(scored[name].mean()) for name in _FORM if scored[name].notna().any()}


def _lengths(scored: pd.DataFrame) -> dict[str, float]:
    means = {f"{name}_mean": float(scored[name].mean()) for name in ("reasoning_tokens", "answer_tokens")}
    median = float(scored["reasoning_tokens"].median())
    return {**means, "reasoning_tokens_median": median, "truncated": float(scored["truncated"].mean())}


def write_comparison(run: RunDir, metrics: dict) -> pd.DataFrame:
    """comparison/metrics.json and comparison/table.csv; returns the table (one row for each metric, primary first)."""
    table = pd.DataFrame([metrics["primary"], *metrics["secondary"]])
    table["p"] = table["p_holm"].astype(float).fillna(table["p_value"])
    table["ci_low"], table["ci_high"] = (table["ci95"].str[end] for end in (0, 1))
    columns = ["label", "n", "base", "tuned", "difference", "ci_low", "ci_high", "p"]
    table = table[columns].rename(columns={"label": "metric"})
    write_json(run.file("comparison/metrics.json"), metrics)
    with atomic(run.file("comparison/table.csv")) as scratch:
        table.to_csv(scratch, index=False)
    return table
