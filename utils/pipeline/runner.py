"""The driver: the six notebooks in order, by papermill, each in a fresh kernel, with one live line per stage."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.markup import escape

from utils.config import differing_settings
from utils.errors import Interrupted, SessionOver, UserError
from utils.files import disk_error
from utils.pipeline.console import LiveLine, show
from utils.pipeline.jupyter import check, execute, signal_kernels
from utils.pipeline.lock import release_lock, take_lock
from utils.pipeline.run_dir import RunDir, open_run
from utils.pipeline.signals import StopRequest
from utils.pipeline.stage import require_ancestors, require_hardware
from utils.pipeline.stages import STAGES, Stage, find_stage
from utils.pipeline.state import SeriesState, write_state
from utils.pipeline.time_limit import Deadline, session_started
from utils.project import ROOT, command
from utils.secrets import redact

_OWNER = "python -m utils run"
_ANSWERS = tuple(
    f"{folder}/{name}" for folder in ("baseline", "tuned") for name in ("answers.jsonl", "forced.jsonl", "probe.jsonl")
)
_SAVED_ON_THE_WAY = {  # by stage: what it would resume from. With the registration go all answers that were given under it
    "00": ("data/registration.json", *_ANSWERS),
    "01": _ANSWERS[:3],
    "03": ("training/checkpoints",),
    "04": _ANSWERS[3:],
}


class StageEnded(Exception):
    """A run's end before its last stage was done: `kind` is the error's type, the message its sentence.

    `exit_code` is 1 for a failure, 4 where the session was over first, 128 + n after signal n; `stage` and `resume`, the
    command that resumes there, are filled in by `run_series`.
    """

    def __init__(self, kind: str, sentence: str, exit_code: int = 1):
        super().__init__(redact(sentence))
        self.kind, self.exit_code = kind, exit_code
        self.stage, self.resume = STAGES[0], ""


def run_series(
    profile: str,
    run_dir: str | Path,
    overrides: Mapping[str, Any],
    first: str = "00",
    last: str = "05",
    fresh: bool = False,
    console: Console | None = None,
    conclude: Callable[[RunDir, bool], None] = lambda run, worked: None,
) -> RunDir:
    """Run the stages `first` to `last` that are not current, then `conclude(run, whether any had to run)`.

    `fresh` reads the profile again and runs every stage. Raises StageEnded, also on file as state.json, where it ends
    early; what finished stays. Raises RunDirError where another process is at work in `run_dir`.
    """
    console = console or Console(force_terminal=sys.stdout.isatty())
    run = open_run(profile, run_dir, overrides, fresh)
    take_lock(run.path, _OWNER)
    series = _Series(run, _span(first, last), fresh, console)
    try:
        with series.stop:
            try:
                series.run_stages(conclude)
            except (Exception, KeyboardInterrupt) as error:
                ended = _ended_by(error, series)
                if ended is None:
                    raise
                with suppress(OSError):  # on a full disk the failure itself is what has to be told
                    series.write_state("failed" if ended.exit_code == 1 else "continue", ended)
                raise ended from None
    finally:
        release_lock(run.path, _OWNER)
    return run


class _Series:
    """The stages of one call, and where they are."""

    def __init__(self, run: RunDir, stages: Sequence[Stage], fresh: bool, console: Console):
        self.run, self.stages, self.fresh, self.console = run, stages, fresh, console
        self.stage, self.worked, self.started = stages[0], False, session_started()
        self.stop = StopRequest(signal_kernels)

    def run_stages(self, conclude: Callable[[RunDir, bool], None]) -> None:
        require_ancestors(self.run, self.stage)
        if self.fresh and self.run.manifest():
            self.run.save()  # whoever resumes finds the profile's settings
            _move_aside(self.run, self.stages)
        if differing := differing_settings(self.run.config):
            settings = ", ".join(f"{key}={value}" for key, value in differing.items())
            text = f"settings other than the profile's: {settings} (--fresh reads the profile again)"
            show(self.console, f"[dim]  {escape(text)}[/dim]")
        self.write_state("running")
        for stage in self.stages:
            self.stage = stage
            check(self.stop)
            self._run_unless_current(stage)
        check(self.stop)
        self.run.save()  # a changed setting on which no stage rests
        conclude(self.run, self.worked)
        self.write_state("done")

    def _run_unless_current(self, stage: Stage) -> None:
        record = self.run.record(stage)
        reason = "--fresh" if self.fresh else self.run.stale_because(stage)
        if reason is None:
            text = f"{stage.number} {stage.title}: unchanged, not run again (took {record.get('seconds', 0):.0f} s)"
            show(self.console, f"[dim]  {text}[/dim]")
            return
        if record.get("state") == "done" and not self.fresh:
            show(self.console, f"[dim]  {stage.number} {stage.title}: again, because {escape(reason)}[/dim]")
        deadline = Deadline.of(self.run.config.hardware.max_hours)
        if self.worked and deadline.is_due():  # at least one stage a session, or a chain of them would stand still
            raise StageEnded(SessionOver.__name__, deadline.sentence(), 4)
        run_stage(self.run, stage, self.console, self.stop)
        self.run.reload()  # a stage may have pinned what it found out
        self.worked = True

    def write_state(self, state: str, ended: StageEnded | None = None) -> None:
        described = {"stage": self.stage.name, "kind": ended.kind, "sentence": str(ended)} if ended else {}
        steps = checkpointed_steps(self.run.path) if ended else 0
        write_state(self.run.path, SeriesState(state=state, started=self.started, steps=steps, **described))


def run_stage(run: RunDir, stage: Stage, console: Console, stop: StopRequest) -> None:
    """Execute one notebook into report/notebooks/; raises StageEnded where the machine cannot, and what papermill raises."""
    try:
        require_hardware(run, stage)
    except UserError as error:
        raise StageEnded(type(error).__name__, str(error)) from None
    run.save()
    output = run.file(f"report/notebooks/{stage.name}.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ["SERIES_ROOT"] = str(ROOT)  # where the kernel finds this package
    with LiveLine(console, stage, run):
        execute(
            stage.notebook, output, {"PROFILE": run.config.profile, "RUN_DIR": str(run.path), "OVERRIDES": {}}, stop
        )


def _ended_by(error: BaseException, series: _Series) -> StageEnded | None:
    """How `error` ends the run; None where it is no stage's, and is for the caller."""
    run, stage, stop = series.run, series.stage, series.stop
    ename = getattr(error, "ename", type(error).__name__)  # papermill's: the error in the cell
    number = 128 + (stop.number or signal.SIGINT)
    interrupted = ename == Interrupted.__name__
    if isinstance(error, StageEnded):
        ended = error
    elif isinstance(error, KeyboardInterrupt):
        ended = StageEnded(Interrupted.__name__, "stopped at once; what was saved stays", number)
    elif stop.asked or interrupted:
        own = getattr(error, "evalue", str(error)) if interrupted else f"stopped by {stop.name}; what was saved stays"
        ended = StageEnded(Interrupted.__name__, own, number)
    elif ename == SessionOver.__name__:
        ended = StageEnded(ename, error.evalue, 4)
    elif isinstance(error, PapermillExecutionError):
        ended = StageEnded(ename, _sentence(error))
        _mark_failed(run, stage, error.evalue)
    elif isinstance(error, DeadKernelError) or str(error).startswith("Kernel died"):  # nbclient's, and jupyter_client's
        ended = StageEnded("killed", "its kernel died, most often because memory ran out; what was saved stays")
        _mark_failed(run, stage, str(ended))
    elif isinstance(error, OSError) and (refused := disk_error(error, run.path)):
        ended = StageEnded(type(refused).__name__, str(refused))
    else:
        return None
    ended.stage = stage
    ended.resume = f"{command()} run --profile {run.config.profile} --run-dir {run.path} --from {stage.number}"
    return ended


def _mark_failed(run: RunDir, stage: Stage, message: str) -> None:
    record = run.record(stage)
    if record.get("state") == "running":
        with suppress(OSError):  # on a full disk it stays "running", which means the same
            run.write_record(stage, **{**record, "state": "failed", "error": redact(message)[:500]})


def _sentence(error: PapermillExecutionError) -> str:
    """A user error's own sentence; anything else with its type, so that it can be reported."""
    if error.ename in {kind.__name__ for kind in UserError.__subclasses__()}:
        return error.evalue
    return f"{error.ename}: {error.evalue} (the executed notebook shows where)"


def _span(first: str, last: str) -> Sequence[Stage]:
    return STAGES[STAGES.index(find_stage(first)) : STAGES.index(find_stage(last)) + 1]


def checkpointed_steps(run_dir: Path) -> int:
    """The training step of the newest checkpoint on file, 0 without one."""
    folders = run_dir.glob("training/checkpoints/*/checkpoint-*")
    return max((int(folder.name.rpartition("-")[2]) for folder in folders if folder.name[-1].isdigit()), default=0)


def _move_aside(run: RunDir, stages: Sequence[Stage]) -> None:
    """Rename what `stages` would resume from, so that `--fresh` begins anew and loses nothing."""
    for stage in stages:
        for name in _SAVED_ON_THE_WAY.get(stage.number, ()):
            place, aside = run.file(name), run.file(f"{name}.old")
            if place.exists():
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
                place.rename(aside)
        if stage.number == "00":
            run.note("registered", None)
