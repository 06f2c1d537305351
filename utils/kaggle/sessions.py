"""Longer than one session: push, wait, and push again with the last output attached, until the series is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from utils.errors import InfrastructureError, KaggleError, RunDirError
from utils.kaggle.api import Kaggle, page
from utils.kaggle.collect import peek
from utils.kaggle.push import push, wait
from utils.pipeline.stages import STAGES
from utils.pipeline.state import SeriesState
from utils.schema import Config

_ORDER = [stage.name for stage in STAGES]


def continuation(kaggle: Kaggle, reference: str) -> Config:
    """The settings of the session to go on with; raises KaggleError where the last one does not ask to be continued."""
    state, config = peek(kaggle, reference)
    if state is None or config is None or state.state != "continue":
        word = "left no run directory" if state is None else f"ended as {state.state!r}"
        raise KaggleError(
            f"The last session of {reference} {word}, so there is nothing to go on with; push without --continue."
        )
    return config


def until_done(
    kaggle: Kaggle,
    request: Any,
    following: Callable[[Config], Any],
    console: Console,
    sessions: int = 6,
    interval_s: float = 30.0,
) -> SeriesState | None:
    """Push `request`, then what `following` makes of each session's settings; returns the last session's state.

    Ends when a session ends as anything but "continue". Raises KaggleError after `sessions` sessions, and where two in a
    row got no further, so that no quota is burnt on a run that stands still; InfrastructureError where Kaggle shows no
    new session, or its output is still the one from before the push.
    """
    shown = _last_state(kaggle, request.slug)
    before: tuple[int, int] | None = None
    for number in range(1, sessions + 1):
        pushed = push(kaggle, request)
        console.print(f"session {number}: version {pushed.version}, {pushed.url}", highlight=False, soft_wrap=True)
        wait(kaggle, pushed.reference, console, interval_s, just_pushed=True)
        state, config = peek(kaggle, pushed.reference)
        if state is not None and state == shown:
            raise InfrastructureError(
                f"The output of {pushed.reference} is still the one from before version {pushed.version}: either Kaggle is slow "
                f"or that session did nothing; look at {page(pushed.reference)}, then go on with push --continue --until-done."
            )
        shown = state
        if state is None or state.state != "continue":
            return state
        reached = (_ORDER.index(state.stage) if state.stage in _ORDER else -1, state.steps)
        if before is not None and reached <= before:
            raise KaggleError(
                f"Two sessions in a row ended at {state.stage}, step {state.steps}: {state.sentence}; give a session more time "
                "(hardware.max_hours), or let checkpoints come closer together (train.save_steps)."
            )
        before = reached
        console.print(f"  to be continued at {state.stage}, step {state.steps}", highlight=False, soft_wrap=True)
        request = following(config)
    raise KaggleError(f"The series is not done after {sessions} sessions; go on with push --continue --until-done.")


def _last_state(kaggle: Kaggle, reference: str) -> SeriesState | None:
    """The state that Kaggle shows now; None for a kernel that does not exist yet or left none."""
    try:
        return peek(kaggle, reference)[0]
    except RunDirError:
        return None
    except KaggleError as error:
        if error.status in (403, 404):
            return None
        raise
