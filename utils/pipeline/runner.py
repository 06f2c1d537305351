"""The driver: the six notebooks in order, by papermill, each in a fresh kernel, with one live line per stage."""

import logging
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.console import Console

from utils.config import differing_settings, read_config
from utils.errors import HardwareError, Interrupted, SessionOver, UserError
from utils.pipeline.console import LiveLine, make_console
from utils.pipeline.lock import release_lock, take_lock
from utils.pipeline.run_dir import CONFIG, RunDir, SeriesState, open_run, write_state
from utils.pipeline.signals import StopRequest
from utils.pipeline.stage import require_ancestors, require_hardware
from utils.pipeline.stages import STAGES, Stage, find_stage
from utils.pipeline.time_limit import Deadline
from utils.progress import show_duration
from utils.project import ROOT, command
from utils.secrets import redact

_OWNER = "python -m utils run"
# ipykernel warns that its port is not encrypted, and tells of the interrupt that comes before each shutdown.
_QUIET = ["--log-level=CRITICAL"]
_OUTPUT_S = 600  # a cell's last output may come late, on a busy machine or one that slept; nbclient gives it 4 s
_WORTH_BEGINNING_S = 1800.0  # loading the model takes some minutes of it
_ANSWER_FILES = ("answers*.jsonl", "forced.jsonl", "probe.jsonl")
_ANSWERS = tuple(f"{folder}/{name}" for folder in ("baseline", "tuned") for name in _ANSWER_FILES)
# By stage what it would resume from, as patterns; with the registration go all answers that were given under it.
_SAVED_ON_THE_WAY = {
    "00": ("data/registration.json", *_ANSWERS),
    "01": _ANSWERS[:3],
    "03": ("training/checkpoints",),
    "04": _ANSWERS[3:],
}


class StageEnded(Exception):
    """A run's end before its last stage was done: `kind` is the error's type, the message its sentence.

    `exit_code` is 1 for a failure, 4 where the session was over first, 128 + n after signal n; `run_series` fills in
    `stage`, and `resume`, the command.
    """

    stage, resume = STAGES[0], ""

    def __init__(self, kind: str, sentence: str, exit_code: int = 1):
        super().__init__(redact(sentence))
        self.kind, self.exit_code = kind, exit_code


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

    `fresh` reads the profile again, but for what a 00 before `first` found out, and runs every stage. Raises
    StageEnded, also on file as state.json, where it ends early; what finished stays. Raises RunDirError where another
    process is at work in `run_dir`.
    """
    console = console or make_console()
    run = open_run(profile, run_dir, overrides, fresh, keep_found=find_stage(first) is not STAGES[0])
    stages = STAGES[STAGES.index(find_stage(first)) : STAGES.index(find_stage(last)) + 1]
    stage, worked = stages[0], False
    take_lock(run.path, _OWNER)
    try:
        with StopRequest(signal_kernels) as stop:
            try:
                _begin(run, stages, fresh, console)
                write_state(run.path, SeriesState(state="running"))
                for stage in stages:
                    check(stop)
                    worked |= _run_unless_current(run, stage, worked, console, stop)
                check(stop)
                conclude(run, worked)
                write_state(run.path, SeriesState(state="done"))
            except (Exception, KeyboardInterrupt) as error:
                ended = _ended_by(error, run, stage, stop)
                if ended is None:
                    raise
                state, steps = "failed" if ended.exit_code == 1 else "continue", count_saved(run.path, stage)
                about = {"stage": stage.name, "kind": ended.kind, "sentence": str(ended), "steps": steps}
                with suppress(OSError):  # on a full disk the failure itself is what has to be told
                    write_state(run.path, SeriesState(state=state, **about))
                raise ended from None
    finally:
        release_lock(run.path, _OWNER)
    return run


def _begin(run: RunDir, stages: Sequence[Stage], fresh: bool, console: Console) -> None:
    require_ancestors(run, stages[0])
    run.save()  # whoever resumes finds the settings, also where the first stage lacks its hardware
    if fresh and run.manifest():
        for stage in stages:
            run.write_record(stage)  # which has not run: whoever resumes runs them all
        _move_aside(run, stages)
    if differing := differing_settings(run.config):
        settings = ", ".join(f"{key}={value}" for key, value in differing.items())
        text = f"  settings other than the profile's: {settings} (--fresh reads the profile again)"
        console.print(text, style="dim")


def _run_unless_current(run: RunDir, stage: Stage, worked: bool, console: Console, stop: StopRequest) -> bool:
    """Whether it had to run; `worked` is whether one before it had to."""
    record, reason = run.record(stage), run.stale_because(stage)
    if reason is None:
        text = f"unchanged, not run again (took {record.get('seconds', 0):.0f} s)"
        console.print(f"  {stage.number} {stage.title}: {text}", style="dim")
        return False
    if record.get("state") == "done":
        console.print(f"  {stage.number} {stage.title}: again, because {reason}", style="dim")
    deadline, needed = Deadline.of(run.config.hardware.max_hours), seconds_to_begin(run, stage)
    if worked and deadline.is_due(next_s=needed):  # at least one stage a session, or a chain of them would stand still
        left = f"; {stage.number} is begun only where {show_duration(needed)} are left" if needed else ""
        raise StageEnded(SessionOver.__name__, f"{deadline.sentence()}{left}", 4)
    run_stage(run, stage, console, stop)
    run.config = read_config(run.file(CONFIG))  # a stage may have pinned what it found out
    return True


def seconds_to_begin(run: RunDir, stage: Stage) -> float:
    """As long as a stage took before, 04 as long as 01; at most half an hour where it resumes in the middle."""
    took = run.record(STAGES[1] if stage.number == "04" else stage).get("seconds", 0.0)
    return min(took, _WORTH_BEGINNING_S) if stage.number in _SAVED_ON_THE_WAY else took


def run_stage(run: RunDir, stage: Stage, console: Console, stop: StopRequest) -> None:
    """Execute one notebook into report/notebooks/; raises HardwareError where the machine cannot, and as `execute`."""
    require_hardware(run, stage)
    run.save()
    output = run.file(f"report/notebooks/{stage.name}.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ["SERIES_ROOT"] = str(ROOT)  # where the kernel finds this package
    parameters = {"PROFILE": run.config.profile, "RUN_DIR": str(run.path), "OVERRIDES": {}}
    with LiveLine(console, stage, run):
        execute(stage.notebook, output, parameters, stop)


def execute(notebook: Path, output: Path, parameters: dict[str, Any], stop: StopRequest) -> None:
    """Run `notebook` and save it with its outputs; raises what papermill does, and Interrupted before the next cell."""
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=_QUIET,
            iopub_timeout=_OUTPUT_S,
            on_cell_execute=lambda **_: check(stop),
        )
    except KeyboardInterrupt:  # it cuts nbclient's task short, and asyncio would print how that ended as a traceback
        logging.getLogger("asyncio").disabled = True
        raise
    finally:  # nbclient leaves a kernel behind that hangs, or that was interrupted before it was ready
        signal_kernels(signal.SIGKILL)


def check(stop: StopRequest) -> None:
    """Raise Interrupted where somebody asked to stop."""
    if stop.asked:
        raise Interrupted(f"stopped by {stop.name}; what was saved stays")


def signal_kernels(number: int = signal.SIGINT) -> None:
    """A signal for every kernel that this process started; SIGINT is what Jupyter's stop button sends."""
    for child in psutil.Process().children():
        with suppress(psutil.Error, OSError):
            if os.getpgid(child.pid) == child.pid:
                os.killpg(child.pid, number)


def _ended_by(error: BaseException, run: RunDir, stage: Stage, stop: StopRequest) -> StageEnded | None:
    """How `error` ends the run; None where it is no stage's, and is for the caller."""
    kind, sentence = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))  # of the cell
    if isinstance(error, StageEnded):
        ended = error
    elif isinstance(error, KeyboardInterrupt) or stop.asked or kind == Interrupted.__name__:
        if kind != Interrupted.__name__:
            how = "at once" if isinstance(error, KeyboardInterrupt) else f"by {stop.name}"
            sentence = f"stopped {how}; what was saved stays"
        ended = StageEnded(Interrupted.__name__, sentence, 128 + (stop.number or signal.SIGINT))
    elif kind == SessionOver.__name__:
        ended = StageEnded(kind, sentence, 4)
    elif isinstance(error, PapermillExecutionError | HardwareError):
        if kind not in {known.__name__ for known in UserError.__subclasses__()}:
            sentence = f"{kind}: {sentence} (the executed notebook shows where)"
        ended = StageEnded(kind, sentence)
    elif isinstance(error, DeadKernelError) or str(error).startswith("Kernel died"):  # nbclient's, and jupyter_client's
        ended = StageEnded("killed", "its kernel died, most often because memory ran out; what was saved stays")
    elif isinstance(error, OSError):  # such as a full disk
        ended = StageEnded(type(error).__name__, f"{error}; what was saved stays")
    else:
        return None
    record = run.record(stage)
    if ended.exit_code == 1 and record.get("state") == "running":
        with suppress(OSError):  # on a full disk it stays "running", which means the same
            run.write_record(stage, **{**record, "state": "failed", "error": str(ended)[:500]})
    ended.stage = stage
    ended.resume = command("run", "--profile", run.config.profile, "--run-dir", run.path, "--from", stage.number)
    return ended


def count_saved(run_dir: Path, stage: Stage) -> int:
    """What an unfinished stage has on file: answers and letters, or else the training step of the newest checkpoint."""
    if folder := {"01": "baseline", "04": "tuned"}.get(stage.number):
        return sum(file.read_bytes().count(b"\n") for file in (run_dir / folder).glob("*.jsonl"))
    folders = run_dir.glob("training/checkpoints/*/checkpoint-*")
    return max((int(folder.name.rpartition("-")[2]) for folder in folders if folder.name[-1].isdigit()), default=0)


def _move_aside(run: RunDir, stages: Sequence[Stage]) -> None:
    """Rename what `stages` would resume from, so that `--fresh` begins anew and loses nothing."""
    for stage in stages:
        for name in _SAVED_ON_THE_WAY.get(stage.number, ()):
            for place in [*run.path.glob(name)]:
                aside = place.with_name(f"{place.name}.old")
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
                place.rename(aside)
