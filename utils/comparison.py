"""Both arms side by side: paired figures, the verdict, its sentence and its picture, from files alone (no torch)."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pandas as pd
from statsmodels.stats.multitest import multipletests

from utils.answers import arm_digest, build_questions, current_answers
from utils.data import read_benchmark
from utils.errors import StageOrderError
from utils.files import atomic, write_json
from utils.metrics import nll_per_token, score_answers
from utils.rundir import RunDir
from utils.stages import BY_NAME
from utils.statistics import PairedResult, compare_paired, detectable_difference, verdict

# Every paired metric: its label, and whether higher is better.
LABELS = {
    "accuracy": ("accuracy", True),
    "multiple_choice": ("multiple-choice accuracy", True),
    "nll": ("held-out loss (nats per token)", False),
    "nll_reasoning": ("held-out loss of the reasoning", False),
    "nll_response": ("held-out loss of the response", False),
    "well_formed": ("well-formed answers", True),
    "one_paragraph": ("answers in one paragraph", True),
    "bullets": ("answers with bullets", False),
    "stopped": ("answers that end by themselves", True),
    "reasoning_tokens": ("tokens of reasoning", False),
}
_LATE = " What was measured was changed after answers existed, so this is no registered result."
SHARES = ("accuracy", "multiple_choice", "well_formed", "one_paragraph", "bullets", "stopped")


@dataclass(frozen=True)
class Arms:
    """What both arms said: scored answers (aligned by id) and losses per row (aligned by id)."""

    base: pd.DataFrame
    tuned: pd.DataFrame
    base_nll: pd.DataFrame
    tuned_nll: pd.DataFrame
    groups: dict[str, str]


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
    held_out = pd.read_parquet(run.file("data/eval.parquet"))
    benchmark = read_benchmark(run.file("data"))
    questions = build_questions(run.config, held_out, benchmark)
    scored, losses = {}, {}
    for arm in ("baseline", "tuned"):
        answers = current_answers(
            run.file(f"{arm}/answers.jsonl"), questions, run.config.generate, arm_digest(run, arm)
        )
        scored[arm] = score_answers(answers, held_out, benchmark)
        losses[arm] = nll_per_token(pd.read_parquet(run.file(f"{arm}/nll.parquet"))).sort_index()
    if list(losses["baseline"].index) != list(losses["tuned"].index):
        raise StageOrderError("baseline/nll.parquet and tuned/nll.parquet hold different rows; run 01 and 04 again.")
    groups = dict(zip(held_out["id"], held_out.get("group", held_out["id"]).fillna(held_out["id"]), strict=True))
    return Arms(scored["baseline"], scored["tuned"], losses["baseline"], losses["tuned"], groups)


def compare(run: RunDir, arms: Arms) -> dict:
    """Everything of metrics.json: the registered primary metric, secondary ones with Holm's correction, the verdict."""
    results = {result.name: result for result in _paired_results(run, arms)}
    name = run.config.evaluate.primary
    if name not in results:
        raise StageOrderError(
            f"evaluate.primary is {name}, but this run's data cannot carry it; it offers {', '.join(results)}."
        )
    primary, secondary = results[name], [result for key, result in results.items() if key != name]
    registration = json.loads(run.file("data/registration.json").read_text(encoding="utf-8"))
    adjusted = multipletests([r.p_value for r in secondary], method="holm")[1] if secondary else []
    return {
        "profile": run.config.profile,
        "primary": primary.as_dict(),
        "secondary": [{**r.as_dict(), "p_holm": float(p)} for r, p in zip(secondary, adjusted, strict=True)],
        "form": {arm: _form(frame) for arm, frame in (("base", arms.base), ("tuned", arms.tuned))},
        "length": {arm: _lengths(frame) for arm, frame in (("base", arms.base), ("tuned", arms.tuned))},
        "registration": registration,
        "verdict": verdict(primary),
        "sentence": describe(primary) + _LATE * registration["changed_after_answers"],
    }


def _paired_results(run: RunDir, arms: Arms) -> list[PairedResult]:
    evaluate = run.config.evaluate
    common = {"resamples": evaluate.resamples, "seed": evaluate.seed}

    def pair(name: str, base: pd.Series, tuned: pd.Series, groups: list[str]) -> PairedResult:
        return compare_paired(name, base, tuned, groups, higher_is_better=LABELS[name][1], **common)

    results = []
    for name, kind in (("accuracy", "open"), ("multiple_choice", "choice")):
        mask = (arms.base["kind"] == kind) & arms.base["correct"].notna()
        if mask.any():
            base, tuned = arms.base[mask], arms.tuned[mask]
            results.append(pair(name, base["correct"], tuned["correct"], list(base["group"])))
    if len(arms.base_nll):
        groups = [arms.groups[identifier] for identifier in arms.base_nll.index]
        for name, column in (("nll", "completion"), ("nll_reasoning", "reasoning"), ("nll_response", "response")):
            results.append(pair(name, arms.base_nll[column], arms.tuned_nll[column], groups))
    if len(arms.base):
        for name in ("well_formed", "one_paragraph", "bullets", "stopped", "reasoning_tokens"):
            results.append(pair(name, arms.base[name], arms.tuned[name], list(arms.base["group"])))
    return results


def _form(frame: pd.DataFrame) -> dict[str, float]:
    return {name: float(frame[name].mean()) for name in ("well_formed", "one_paragraph", "bullets", "stopped", "parsed")
            if frame[name].notna().any()}  # fmt: skip


def _lengths(frame: pd.DataFrame) -> dict[str, float]:
    answer = frame["tokens"] - frame["reasoning_tokens"]
    return {
        "reasoning_tokens_mean": float(frame["reasoning_tokens"].mean()),
        "reasoning_tokens_median": float(frame["reasoning_tokens"].median()),
        "answer_tokens_mean": float(answer.mean()),
    }


def describe(result: PairedResult) -> str:
    """The verdict in words: never more than the interval carries."""
    label, _ = LABELS[result.name]
    low, high = result.ci95
    if result.name in SHARES:
        values = f"{label} went from {result.base:.1%} to {result.tuned:.1%}"
        change = f"{100 * result.difference:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    else:
        values = f"{label} went from {result.base:.3f} to {result.tuned:.3f}"
        change = f"{result.difference:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
    p_value = "p < 0.001" if result.p_value < 0.001 else f"p = {result.p_value:.3f}"
    grouped = f" in {result.groups} groups" if result.groups < result.n else ""
    start = f"On {result.n} held-out questions{grouped}, {values}: {change}, {p_value}."
    match verdict(result):
        case "better":
            return f"{start} The fine-tuned model is better on this metric."
        case "worse":
            return f"{start} The fine-tuned model is worse on this metric."
    detectable = detectable_difference(result.groups)
    hint = f" With this many, only about {100 * detectable:.0f} points or more would show." * (result.name in SHARES)
    return f"{start} This cannot tell the two apart.{hint}"


def write_comparison(run: RunDir, metrics: dict) -> pd.DataFrame:
    """comparison/metrics.json and comparison/table.csv; returns the table (one row for each metric, primary first)."""
    rows = [
        {
            "metric": LABELS[result["name"]][0],
            "n": result["n"],
            "base": result["base"],
            "tuned": result["tuned"],
            "difference": result["difference"],
            "ci_low": result["ci95"][0],
            "ci_high": result["ci95"][1],
            "p": result.get("p_holm", result["p_value"]),
        }
        for result in (metrics["primary"], *metrics["secondary"])
    ]
    table = pd.DataFrame(rows)
    write_json(run.file("comparison/metrics.json"), metrics)
    with atomic(run.file("comparison/table.csv")) as scratch:
        table.to_csv(scratch, index=False)
    return table
