"""Longer than one session: push, wait, and push again with the last output attached, until the series is done."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from utils.errors import KaggleError
from utils.kaggle.api import Kaggle
from utils.kaggle.collect import peek
from utils.kaggle.push import Submission, push, wait
from utils.pipeline.stages import STAGES
from utils.pipeline.state import SeriesState
from utils.schema import Config

_ORDER = [stage.name for stage in STAGES]


def read_unfinished(kaggle: Kaggle, reference: str) -> Config:
    """The settings of the session to resume; raises KaggleError where the last one does not ask for another."""
    state, config = peek(kaggle, reference)
    if state is None or config is None or state.state != "continue":
        word = "left no run directory" if state is None else f"ended as {state.state!r}"
        raise KaggleError(f"The last session of {reference} {word}, so there is nothing to resume; drop --continue.")
    return config


def push_until_done(
    kaggle: Kaggle,
    first: Submission,
    following: Callable[[Config], Submission],
    console: Console,
    sessions: int = 6,
    interval_s: float = 30.0,
) -> SeriesState | None:
    """Push `first`, then what `following` makes of each session's settings; returns the last session's state.

    Ends when a session ends as anything but "continue". Raises KaggleError after `sessions` sessions, and where two in a
    row got no further, so that no quota is burnt on a run that stands still; InfrastructureError where Kaggle shows no
    new session.
    """
    what, before = first, (-2, 0)
    for number in range(1, sessions + 1):
        version, url = push(kaggle, what)
        console.print(f"session {number}: version {version}, {url}", highlight=False, soft_wrap=True)
        wait(kaggle, first.reference, console, interval_s, just_pushed=True)
        state, config = peek(kaggle, first.reference)
        if state is None or config is None or state.state != "continue":
            return state
        reached = (_ORDER.index(state.stage) if state.stage in _ORDER else -1, state.steps)
        if reached <= before:
            raise KaggleError(
                f"Two sessions in a row ended at {state.stage}, step {state.steps}: {state.sentence}; give a session more time "
                "(hardware.max_hours), or let checkpoints come closer together (train.save_steps)."
            )
        before = reached
        console.print(f"  to be continued at {state.stage}, step {state.steps}", highlight=False, soft_wrap=True)
        what = following(config)
    raise KaggleError(f"The series is not done after {sessions} sessions; push --continue --until-done for more.")
