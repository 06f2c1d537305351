"""comparison/metrics.json: its one schema, checked before it is written; read by card, console and collect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from utils.errors import RunDirError

Verdict = Literal["better", "worse", "cannot tell"]
Interval = tuple[float, float]


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


class Claim(BaseModel, extra="forbid"):
    """What people would like to say, and what the statistics let them say."""

    claim: Literal["knows more", "reasons shorter", "keeps form", "imitates the reference", "preferred by a reader"]
    metric: str | None  # the metric that decides; None where this run measured none
    verdict: Verdict
    sentence: str


class Preference(Claim):
    """What a reader's blind ratings let one say; a share of 0.5 is no preference."""

    claim: Literal["preferred by a reader"] = "preferred by a reader"
    metric: None = None
    n: int  # pairs in which one answer was preferred
    share: float | None  # of them, in which it was the fine-tuned model's
    ci95: Interval
    p_value: float  # exact binomial test, two-sided


class Comparison(BaseModel, extra="forbid"):
    """The whole file."""

    profile: str
    benchmarks: list[str]  # in the order of the configuration: the first one's metrics carry no name after a colon
    primary: Result
    secondary: list[Result]
    form: dict[Literal["base", "tuned"], dict[str, float]]  # shares of a model's answers, where they apply
    length: dict[Literal["base", "tuned"], dict[str, float]]  # tokens in a model's answers
    nll_rows_left_out: int  # held-out rows longer than model.max_seq_length: in no loss, of neither model
    contamination: dict[str, float | int | bool | None]
    registration: dict[str, Any]  # data/registration.json
    claims: list[Preference | Claim]
    verdict: Verdict
    sentence: str


def read_sentence(run_dir: Path) -> str:
    """The verdict's sentence in comparison/metrics.json; raises RunDirError where that file is not what 04 writes."""
    file = run_dir / "comparison" / "metrics.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["sentence"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = "it holds no sentence" if isinstance(error, (LookupError, TypeError)) else error
        raise RunDirError(f"{file} cannot be read ({reason}); run 04_comparison again, which writes it.") from None
