"""Both arms side by side: paired figures, the claims they carry, and their table, from files alone (no torch)."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pandas as pd
from statsmodels.stats.multitest import multipletests

from utils.errors import StageOrderError
from utils.evaluation.metrics import find_metric, nll_per_token, rouge_l, score_answers
from utils.evaluation.probe_results import paired_probe
from utils.evaluation.questions import arm_digest, current_answers, load_questions, read_forced
from utils.evaluation.results import Comparison
from utils.evaluation.statistics import PairedResult, compare_paired
from utils.evaluation.verdict import decide, headline, state_claims
from utils.files import atomic, write_json
from utils.pipeline.run_dir import RunDir
from utils.pipeline.stages import BY_NAME

_LATE = " What was measured was changed after answers existed, so this is no registered result."
_FORM = ("well_formed", "one_paragraph", "bullets", "truncated", "reasoning_tokens", "answer_tokens")


@dataclass(frozen=True)
class Arms:
    """What both arms said: scored answers (aligned by id) and losses per row (aligned by id).

    `groups` has every held-out row ({id: group}), those too long for a loss included.
    """

    base: pd.DataFrame
    tuned: pd.DataFrame
    base_nll: pd.DataFrame
    tuned_nll: pd.DataFrame
    groups: dict[str, str]
    probe: tuple[pd.DataFrame, pd.DataFrame] | None = None
    benchmarks: tuple[str, ...] = ()  # in the order of the configuration, evaluate.benchmark first


def load_arms(run: RunDir) -> Arms:
    """Read and score the answers of both arms.

    Raises StageOrderError where the baseline or the comparison has not run, or where one arm lacks answers or losses
    that the other has.
    """
    for name in ("01_baseline_inference", "04_comparison"):
        if not run.record(BY_NAME[name]).get("inputs"):
            raise StageOrderError(
                f"{run.path} has no answers of both arms yet: {name} has not run; run the series to 04."
            )
    questions, held_out, benchmark = load_questions(run)
    scored, losses = {}, {}
    for arm in ("baseline", "tuned"):
        answers = current_answers(
            run.file(f"{arm}/answers.jsonl"), questions, run.config.generate, arm_digest(run, arm)
        )
        forced = read_forced(run.file(f"{arm}/forced.jsonl"), answers, benchmark)
        scored[arm] = score_answers(answers, held_out, benchmark, forced)
        scored[arm]["rouge_l"] = scored[arm]["id"].map(rouge_l(answers, held_out))
        losses[arm] = nll_per_token(pd.read_parquet(run.file(f"{arm}/nll.parquet"))).sort_index()
    if list(losses["baseline"].index) != list(losses["tuned"].index):
        raise StageOrderError("baseline/nll.parquet and tuned/nll.parquet hold different rows; run 01 and 04 again.")
    groups = dict(zip(held_out["id"], held_out.get("group", held_out["id"]).fillna(held_out["id"]), strict=True))
    benchmarks = () if benchmark is None else tuple(dict.fromkeys(benchmark["benchmark"]))
    return Arms(*scored.values(), *losses.values(), groups, paired_probe(run), benchmarks)


def compare(run: RunDir, arms: Arms) -> dict:
    """Everything of metrics.json (schema: `results.Comparison`): the registered primary metric, secondary ones with
    Holm's correction, the claims, the verdict."""
    results = {result.name: result for result in paired_results(run, arms)}
    name = run.config.evaluate.primary
    if name not in results:
        raise StageOrderError(
            f"evaluate.primary is {name}, but this run's data cannot carry it; it offers {', '.join(results)}."
        )
    primary, secondary = results[name], [result for key, result in results.items() if key != name]
    adjusted = multipletests([r.p_value for r in secondary], method="holm")[1] if secondary else []
    corrected = {r.name: float(p) for r, p in zip(secondary, adjusted, strict=True)}
    registration = _read(run, "data/registration.json")
    return Comparison(
        profile=run.config.profile,
        benchmarks=list(arms.benchmarks),
        primary=_entry(primary, None),
        secondary=[_entry(result, corrected[result.name]) for result in secondary],
        form={arm: _form(frame) for arm, frame in (("base", arms.base), ("tuned", arms.tuned)) if len(frame)},
        length={arm: _lengths(frame) for arm, frame in (("base", arms.base), ("tuned", arms.tuned)) if len(frame)},
        nll_rows_left_out=len(arms.groups) - len(arms.base_nll),
        contamination=_read(run, "data/split.json").get("contamination", {}),
        registration=registration,
        claims=state_claims(results, corrected),
        verdict=decide(name, results, corrected)[0],
        sentence=headline(name, results, corrected) + _LATE * registration["changed_after_answers"],
    ).model_dump(mode="json")


def _read(run: RunDir, name: str) -> dict:
    return json.loads(run.file(name).read_text(encoding="utf-8"))


def _entry(result: PairedResult, p_holm: float | None) -> dict:
    metric = find_metric(result.name)
    return {**result.as_dict(), "label": metric.label, "unit": metric.unit, "p_holm": p_holm}


def paired_results(run: RunDir, arms: Arms) -> list[PairedResult]:
    """Every metric that both arms carry, compared pair by pair."""
    evaluate = run.config.evaluate

    def pair(name: str, base: pd.Series, tuned: pd.Series, groups: list[str]) -> PairedResult:
        better = find_metric(name).higher_is_better
        settings = {"resamples": evaluate.resamples, "seed": evaluate.seed}
        return compare_paired(name, base, tuned, groups, higher_is_better=better, **settings)

    def pair_columns(name: str, column: str, mask: pd.Series) -> PairedResult:
        base, tuned = arms.base[mask], arms.tuned[mask]
        return pair(name, base[column], tuned[column], list(base["group"]))

    results = []
    checkable = (arms.base["kind"] == "open") & arms.base["correct"].notna()
    if checkable.any():
        results.append(pair_columns("accuracy", "correct", checkable))
    items = arms.base["kind"] == "choice"
    for benchmark in arms.benchmarks:
        # The first one named carries the registered name, whatever the others are called and their ids look like.
        ending = "" if benchmark == arms.benchmarks[0] else f":{benchmark}"
        mask = items & (arms.base["benchmark"] == benchmark)
        for name, column in (
            ("multiple_choice", "correct"),
            ("multiple_choice_forced", "forced"),
            ("parsed", "parsed"),
        ):
            results.append(pair_columns(name + ending, column, mask))
    if arms.probe is not None:
        base, tuned = (figures["correct"].astype(float) for figures in arms.probe)
        results.append(pair("letter_probe", base, tuned, list(arms.probe[0]["id"])))
    if len(arms.base_nll):
        groups = [arms.groups[identifier] for identifier in arms.base_nll.index]
        for name, column in (("nll", "completion"), ("nll_reasoning", "reasoning"), ("nll_response", "response")):
            results.append(pair(name, arms.base_nll[column], arms.tuned_nll[column], groups))
    if len(arms.base):
        everything = arms.base["id"].notna()
        results += [pair_columns(name, name, everything) for name in _FORM]
    if "rouge_l" in arms.base and arms.base["rouge_l"].notna().any():
        results.append(pair_columns("rouge_l", "rouge_l", arms.base["rouge_l"].notna()))
    return results


def _form(frame: pd.DataFrame) -> dict[str, float]:
    return {name: float(frame[name].mean()) for name in ("well_formed", "one_paragraph", "bullets", "stopped", "parsed")
            if frame[name].notna().any()}  # fmt: skip


def _lengths(frame: pd.DataFrame) -> dict[str, float]:
    return {
        "reasoning_tokens_mean": float(frame["reasoning_tokens"].mean()),
        "reasoning_tokens_median": float(frame["reasoning_tokens"].median()),
        "answer_tokens_mean": float(frame["answer_tokens"].mean()),
        "truncated": float(frame["truncated"].mean()),
    }


def write_comparison(run: RunDir, metrics: dict) -> pd.DataFrame:
    """comparison/metrics.json and comparison/table.csv; returns the table (one row for each metric, primary first)."""
    rows = [
        {
            "metric": result["label"],
            "n": result["n"],
            "base": result["base"],
            "tuned": result["tuned"],
            "difference": result["difference"],
            "ci_low": result["ci95"][0],
            "ci_high": result["ci95"][1],
            "p": result["p_value"] if result["p_holm"] is None else result["p_holm"],
        }
        for result in (metrics["primary"], *metrics["secondary"])
    ]
    table = pd.DataFrame(rows)
    write_json(run.file("comparison/metrics.json"), metrics)
    with atomic(run.file("comparison/table.csv")) as scratch:
        table.to_csv(scratch, index=False)
    return table
