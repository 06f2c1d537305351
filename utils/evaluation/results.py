"""comparison/metrics.json: its one schema, checked before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from utils.errors import RunDirError
from utils.files import parse_json

Verdict = Literal["better", "worse", "cannot tell"]
Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Result(_Part):
    """One metric in both arms, on the same items. A share is between 0 and 1; the difference is tuned - base."""

    name: str
    label: str
    unit: Literal["share", "nats per token", "tokens", "score"]
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
    p_value: float
    p_holm: float | None  # corrected over all secondary metrics; the primary needs none


class Claim(_Part):
    """What people would like to say, and what the statistics let them say."""

    claim: Literal["knows more", "reasons shorter", "keeps form", "imitates the reference"]
    metric: str | None  # the metric that decides; None where this run measured none
    verdict: Verdict
    sentence: str


class Form(_Part):
    """Shares of one arm's answers; a share is absent (null) where it does not apply."""

    well_formed: float | None = None
    one_paragraph: float | None = None
    bullets: float | None = None
    stopped: float | None = None
    parsed: float | None = None


class Length(_Part):
    """Tokens in one arm's answers."""

    reasoning_tokens_mean: float
    reasoning_tokens_median: float
    answer_tokens_mean: float
    truncated: float


class Registration(_Part):
    """What was fixed before the first answer, and whether it was changed afterwards."""

    primary: str
    open_questions: int
    choice_questions: int
    questions_sha256: str  # over ids and prompts, and what the answers are held against
    decoding: dict
    seed: int
    changed_after_answers: bool


class Comparison(_Part):
    """The whole file."""

    profile: str
    benchmarks: list[str]  # in the order of the configuration: the first one's metrics carry no name after a colon
    primary: Result
    secondary: list[Result]
    form: dict[Literal["base", "tuned"], Form]
    length: dict[Literal["base", "tuned"], Length]
    nll_rows_left_out: int  # held-out rows longer than model.max_seq_length: in no loss, of neither arm
    contamination: dict[str, float | int | bool | None]
    registration: Registration
    claims: list[Claim]
    verdict: Verdict
    sentence: str


class _Told(BaseModel):
    sentence: str


def read_sentence(run_dir: Path) -> str:
    """The verdict's sentence in comparison/metrics.json; raises RunDirError where that file is not what 04 writes."""
    file = run_dir / "comparison" / "metrics.json"
    try:
        return _Told.model_validate(parse_json(file.read_bytes())).sentence
    except (OSError, ValueError) as error:
        reason = "it holds no sentence" if isinstance(error, ValidationError) else error
        raise RunDirError(f"{file} cannot be read ({reason}); run 04_comparison again, which writes it.") from None
