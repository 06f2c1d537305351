"""How a run stands, in `state.json`: read by whoever brings the run home or resumes it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from utils.files import read_json, write_json

FILE = "state.json"


class SeriesState(BaseModel):
    """`running` on file means that the process died; `continue`, that the session ended before the work did."""

    state: Literal["running", "done", "continue", "failed"]
    stage: str = ""  # the one that failed or is to be resumed
    kind: str = ""  # the failure's type
    sentence: str = ""
    steps: int = 0  # checkpointed so far: two sessions in a row with the same number made no progress


def write_state(run_dir: Path, state: SeriesState) -> None:
    """Nothing where there is no run directory."""
    if run_dir.is_dir():
        write_json(run_dir / FILE, state.model_dump(mode="json"))


def read_state(run_dir: Path) -> SeriesState | None:
    """The state on file; None where there is none that can be read."""
    try:
        return SeriesState.model_validate(read_json(run_dir / FILE))
    except (OSError, ValueError):
        return None
