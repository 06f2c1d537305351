"""What comparison/metrics.json holds of each metric, and its sentence, as console, collect and publish read it."""

import json
from pathlib import Path
from typing import Literal

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


def read_sentence(run_dir: Path) -> str:
    """The verdict's sentence in comparison/metrics.json; raises RunDirError where that file is not what 04 writes."""
    file = run_dir / "comparison" / "metrics.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["sentence"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = "it holds no sentence" if isinstance(error, (LookupError, TypeError)) else error
        raise RunDirError(f"{file} cannot be read ({reason}); run 04_comparison again, which writes it.") from None
