"""Longer than one session: push, wait, and push again with the last output attached, until the series is done."""

from rich.console import Console

from utils.errors import ServiceError
from utils.kaggle.api import Kaggle
from utils.kaggle.collect import peek
from utils.kaggle.push import Submission, push, wait
from utils.pipeline.state import SeriesState


def require_unfinished(kaggle: Kaggle, reference: str) -> None:
    """Raise ServiceError where the last session does not ask for another."""
    state = peek(kaggle, reference)
    if state is None or state.state != "continue":
        word = "left no run directory" if state is None else f"ended as {state.state!r}"
        raise ServiceError(f"The last session of {reference} {word}, so there is nothing to resume; drop --continue.")


def push_until_done(
    kaggle: Kaggle, what: Submission, console: Console, sessions: int = 6, interval_s: float = 30.0
) -> SeriesState | None:
    """Push `what`, and again with the last output attached, until a session is not to be continued; its state.

    Raises ServiceError after `sessions` sessions, and where two in a row got no further.
    """
    before = ("", -1)
    for number in range(1, sessions + 1):
        version, url = push(kaggle, what)
        console.print(f"session {number}: version {version}, {url}")
        wait(kaggle, what.reference, console, interval_s, just_pushed=True)
        state = peek(kaggle, what.reference)
        if state is None or state.state != "continue":
            return state
        reached = (state.stage, state.steps)  # their names are in order
        if reached <= before:
            found = f"Two sessions in a row ended at {state.stage}, step {state.steps}: {state.sentence}"
            raise ServiceError(f"{found}; raise hardware.max_hours, or lower train.save_steps.")
        before, what = reached, what.resuming()
        console.print(f"  to be continued at {state.stage}, step {state.steps}")
    raise ServiceError(f"The series is not done after {sessions} sessions; push --continue --until-done for more.")
