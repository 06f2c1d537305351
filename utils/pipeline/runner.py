"""The driver: the six notebooks in order, by papermill, each in a fresh kernel, with one live line per stage."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.markup import escape

from utils.errors import Interrupted, SessionOver, UserError
from utils.files import disk_error
from utils.pipeline.console import LiveLine
from utils.pipeline.jupyter import Kernels
from utils.pipeline.lock import release_lock, take_lock
from utils.pipeline.run_dir import RunDir, open_run
from utils.pipeline.stage import require_ancestors
from utils.pipeline.stages import STAGES, Stage, find_stage
from utils.pipeline.state import SeriesState, write_state
from utils.pipeline.summary import summarise
from utils.pipeline.time_limit import Deadline, note_start
from utils.progress import VARIABLE
from utils.project import ROOT, command
from utils.report.index import executed_dir, write_report
from utils.secrets import redact

_OWNER = "python -m utils run"
_ANSWERS = ("answers.jsonl", "forced.jsonl", "probe.jsonl")
_GONE_ON_FROM = {  # by stage: what was saved on the way, with which it would go on
    "00": ("data/registration.json",),
    "01": tuple(f"baseline/{name}" for name in _ANSWERS),
    "03": ("training/checkpoints",),
    "04": tuple(f"tuned/{name}" for name in _ANSWERS),
}


class SeriesFailed(Exception):
    """A stage failed; the message is its sentence, `continue_with` the command that goes on from there."""

    def __init__(self, run: RunDir, stage: Stage, sentence: str, kind: str = ""):
        super().__init__(redact(sentence))
        self.stage, self.kind = stage, kind
        self.continue_with = (
            f"{command()} run --profile {run.config.profile} --run-dir {run.path} --from {stage.number}"
        )


class SeriesPaused(SeriesFailed):
    """The session's time is up before the work is done (hardware.max_hours); nothing failed."""


class SeriesInterrupted(SeriesPaused):
    """Somebody asked it to stop (Ctrl-C, SIGTERM); `status` is the exit status by which a shell knows that."""

    def __init__(self, run: RunDir, stage: Stage, sentence: str, number: int):
        super().__init__(run, stage, sentence, Interrupted.__name__)
        self.status = 128 + number


def run_series(
    profile: str,
    run_dir: str | Path,
    overrides: Mapping[str, Any],
    first: str = "00",
    last: str = "05",
    fresh: bool = False,
    console: Console | None = None,
) -> RunDir:
    """Run the stages `first` to `last` that are not current, then write the report.

    Raises SeriesFailed with the failing cell's sentence; what finished stays. Raises SeriesPaused where the session is
    over first, or SeriesInterrupted where it was asked to stop. How it ended is in state.json either way. `fresh` forgets
    earlier overrides and runs every stage again. Raises RunDirError where another process is at work in `run_dir`.
    """
    console = console or Console(force_terminal=sys.stdout.isatty())
    run = open_run(profile, run_dir, overrides, forget=fresh)
    lock = take_lock(run.path, _OWNER)
    try:
        with Kernels(lock) as kernels:
            return _run_locked(run, first, last, fresh, console, kernels)
    except OSError as error:
        raise (disk_error(error, run.path) or error) from None
    finally:
        release_lock(run.path, _OWNER)


def _run_locked(run: RunDir, first: str, last: str, fresh: bool, console: Console, kernels: Kernels) -> RunDir:
    began = note_start()
    try:
        with _interruptible(run, find_stage(first), kernels):  # also between two stages, before and after them
            return _run_to_the_end(run, first, last, fresh, console, kernels, began)
    except SeriesFailed as failure:
        state = "continue" if isinstance(failure, SeriesPaused) else "failed"
        ended = SeriesState(
            state=state,
            stage=failure.stage.name,
            kind=failure.kind,
            sentence=str(failure),
            started=began,
            steps=checkpointed_steps(run.path),
        )
        try:
            _note_end(run, ended)
        except Interrupted:  # raised once: whoever asks only now changes nothing about how it ended
            _note_end(run, ended)
        raise


def _note_end(run: RunDir, ended: SeriesState) -> None:
    with suppress(OSError):  # a full disk, say: the failure itself is what has to be told
        write_state(run.path, ended)


def _run_to_the_end(
    run: RunDir, first: str, last: str, fresh: bool, console: Console, kernels: Kernels, began: float
) -> RunDir:
    require_ancestors(run, find_stage(first))
    if fresh:
        run.save()  # the notebooks would find the earlier overrides otherwise
        _set_aside(run, first, last)
    if run.overrides:
        kept = ", ".join(f"{key}={value}" for key, value in run.overrides.items())
        console.print(
            f"[dim]  settings beside the profile's: {escape(kept)} (--fresh forgets them)[/dim]",
            highlight=False,
            soft_wrap=True,
        )
    started = time.monotonic()
    write_state(run.path, SeriesState(state="running", started=began))
    run, worked = _run_stages(run, first, last, fresh, console, kernels)
    if not worked:
        run.save()  # a changed setting on which no stage rests
    if worked or not run.file("report/index.html").exists():
        with _interruptible(run, find_stage(last), kernels):
            write_report(run)
    write_state(run.path, SeriesState(state="done", started=began))
    summarise(run, console, time.monotonic() - started)
    return run


@contextmanager
def _interruptible(run: RunDir, stage: Stage, kernels: Kernels) -> Iterator[None]:
    """Whatever a wish to stop ends in, a sentence or a dead kernel, it is told as SeriesInterrupted."""
    try:
        kernels.check()
        yield
    except SeriesInterrupted:
        raise
    except (SeriesFailed, Interrupted, KeyboardInterrupt) as end:
        if isinstance(end, KeyboardInterrupt):
            raise SeriesInterrupted(run, stage, "stopped at once; what was saved stays", signal.SIGINT) from None
        if not kernels.stop.asked:
            raise
        known = isinstance(end, SeriesFailed) and end.kind == Interrupted.__name__
        told = (
            str(end)
            if known or isinstance(end, Interrupted)
            else f"stopped by {kernels.stop.name}; what was saved stays"
        )
        raise SeriesInterrupted(run, stage, told, kernels.stop.number) from None


def _run_stages(
    run: RunDir, first: str, last: str, fresh: bool, console: Console, kernels: Kernels
) -> tuple[RunDir, bool]:
    """The run as its stages left it, and whether any had to run; raises SeriesFailed and SeriesPaused."""
    worked = False
    for stage in _span(first, last):
        with _interruptible(run, stage, kernels):
            reason = "--fresh" if fresh else run.stale_because(stage)
            if reason is None:
                seconds = run.record(stage).get("seconds", 0)
                console.print(
                    f"[dim]  {stage.number} {stage.title}: unchanged, not run again (took {seconds:.0f} s)[/dim]"
                )
                continue
            if run.record(stage).get("state") == "done" and not fresh:
                told = f"[dim]  {stage.number} {stage.title}: again, because {reason}[/dim]"
                console.print(told, highlight=False, soft_wrap=True)
            deadline = Deadline.of(run.config.hardware.max_hours)
            if worked and deadline.is_due():  # at least one stage a session, or a chain of them would stand still
                raise SeriesPaused(run, stage, deadline.sentence(), SessionOver.__name__)
            run_stage(run, stage, console, kernels)
            run = open_run("auto", run.path)  # a stage may have pinned what it found out
            worked = True
    return run, worked


def _span(first: str, last: str) -> Sequence[Stage]:
    return STAGES[STAGES.index(find_stage(first)) : STAGES.index(find_stage(last)) + 1]


def checkpointed_steps(run_dir: Path) -> int:
    """The training step of the newest checkpoint on file, 0 without one."""
    folders = run_dir.glob("training/checkpoints/*/checkpoint-*")
    return max((int(folder.name.rpartition("-")[2]) for folder in folders if folder.name[-1].isdigit()), default=0)


def _set_aside(run: RunDir, first: str, last: str) -> None:
    """Rename what the stages `first` to `last` would go on from, so that `--fresh` begins anew and loses nothing."""
    for stage in _span(first, last):
        for name in _GONE_ON_FROM.get(stage.number, ()):
            place, aside = run.file(name), run.file(f"{name}.old")
            if place.exists():
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
                place.rename(aside)
        if stage.number == "00":
            run.note("registered", None)


def run_stage(run: RunDir, stage: Stage, console: Console, kernels: Kernels) -> None:
    """Execute one notebook into report/notebooks/; raises SeriesFailed."""
    output = executed_dir(run) / f"{stage.name}.ipynb"
    parameters = {"PROFILE": run.config.profile, "RUN_DIR": str(run.path), "OVERRIDES": run.overrides}
    with tempfile.TemporaryDirectory() as scratch, LiveLine(console, stage, Path(scratch) / "progress.json") as line:
        os.environ[VARIABLE] = str(line.file)
        os.environ["SERIES_ROOT"] = str(ROOT)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            kernels.execute(stage.notebook, output, parameters)
        except PapermillExecutionError as error:
            if error.ename == SessionOver.__name__:
                raise SeriesPaused(run, stage, error.evalue, error.ename) from None
            if not kernels.stop.asked:
                _mark_failed(run, stage, error.evalue)
            raise SeriesFailed(run, stage, _sentence(error), error.ename) from None
        except OSError as error:  # the executed notebook could not be saved
            if told := disk_error(error, run.path):
                raise SeriesFailed(run, stage, str(told), type(told).__name__) from None
            raise
        except DeadKernelError:
            message = "its kernel died, most often because memory ran out; what was saved stays"
            _mark_failed(run, stage, message)
            raise SeriesFailed(run, stage, message, "killed") from None
        finally:
            del os.environ[VARIABLE]


def _mark_failed(run: RunDir, stage: Stage, message: str) -> None:
    record = run.record(stage)
    if record.get("state") == "running":
        with suppress(OSError):  # on a full disk it stays "running", which means the same
            run.write_record(stage, **{**record, "state": "failed", "error": redact(message)[:500]})


def _sentence(error: PapermillExecutionError) -> str:
    """A user error's own sentence; anything else with its type, so that it can be reported."""
    known = {kind.__name__ for kind in UserError.__subclasses__()}
    if error.ename in known:
        return error.evalue
    return f"{error.ename}: {error.evalue} (the executed notebook shows where)"
