"""Bring a kernel's log and output home, compare them with the manifest, and say how the run ended."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from utils.errors import RunDirError, last_line
from utils.files import list_files, parse_json, write_text
from utils.kaggle.api import FINISHED, Kaggle, page, split_reference
from utils.kaggle.attach import DEPTH, is_ours
from utils.pipeline.console import read_sentence
from utils.pipeline.run_dir import STATE, SeriesState, altered_files, read_state
from utils.project import command
from utils.secrets import redact

_OF_THE_MACHINE = "HardwareError"  # the session lacked what the run asks for; the run is not judged
_NO_MEMORY = "tried to allocate more memory"  # Kaggle's words, for a session that it ended for that
# torch.cuda.OutOfMemoryError: what it says
_ERROR = re.compile(r"(?m)^(?:[\w.]+\.)?(\w*(?:Error|Exception)|OutOfMemory): (.*)$")


class Outcome(IntEnum):
    """What the exit status says; `CONTINUE` is a session that ended itself in time, before the work was done."""

    PASS = 0
    FAIL = 1
    INFRASTRUCTURE = 3
    CONTINUE = 4


class Collected(NamedTuple):
    """How a kernel's last session ended, in one word and one sentence."""

    outcome: Outcome
    sentence: str
    resumable: bool = False


def collect(kaggle: Kaggle, reference: str, target: Path, console: Console) -> Collected:
    """Fetch log and output of the last session into `target`, a run directory, and classify how it ended.

    What lay beside the run goes into target/kernel. Raises as Kaggle does.
    """
    status, message = kaggle.status(reference)
    if status not in FINISHED:
        sentence = f"{reference} has not ended yet ({status}); collect it later, or by --wait."
        return Collected(Outcome.INFRASTRUCTURE, sentence)
    target.mkdir(parents=True, exist_ok=True)
    with _fetched(kaggle, reference, within=target) as (folder, run):
        log_file = folder / f"{split_reference(reference)[1]}.log"
        log = redact(readable_log(log_file.read_text(encoding="utf-8", errors="replace"))) if log_file.exists() else ""
        write_text(log_file, log)
        (target / STATE).unlink(missing_ok=True)  # an earlier session's would be taken for this one's
        files = list_files(folder, ".")
        for path in files:
            if run is not None and path.is_relative_to(run):
                place = target / path.relative_to(run)
            else:
                place = target / ("" if path == log_file else "kernel") / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, place)
    console.print(f"{len(files)} file(s) are in {target}")
    state = read_state(target)
    return classify(status, message, target, log)._replace(resumable=state is not None and state.state != "done")


def peek(kaggle: Kaggle, reference: str) -> SeriesState | None:
    """The state in the last session's output, without the rest of it; None where it left none."""
    with _fetched(kaggle, reference, r"(^|/)(manifest|state)\.json$") as (_, run):
        return read_state(run) if run else None


@contextmanager
def _fetched(
    kaggle: Kaggle, reference: str, pattern: str | None = None, within: Path | None = None
) -> Iterator[tuple[Path, Path | None]]:
    """(folder, run directory in it or None) with the output in it, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix=".fetched-", dir=within) as name:
        kaggle.output(reference, Path(name), pattern)
        yield Path(name), run_folder(Path(name))


def run_folder(output: Path) -> Path | None:
    """The run directory in a kernel's output, wherever RUN_DIR put it; None without."""
    files = (file for depth in range(DEPTH + 1) for file in output.glob("*/" * depth + "manifest.json"))
    found = [file.parent for file in files if is_ours(file)]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(output)) for path in found)
        raise RunDirError(f"The output holds {len(found)} runs ({names}); expected one.")
    return found[0] if found else None


def readable_log(log: str) -> str:
    """Kaggle's log (a JSON list of stream, time and data) as the text that was printed; anything else as it is."""
    with suppress(ValueError, TypeError, KeyError):
        return "".join(str(entry["data"]) for entry in parse_json(log))
    return log


def classify(status: str, message: str, target: Path, log: str) -> Collected:
    """The outcome by Kaggle's status, the run's own state, its manifest and, where there is neither, the log."""
    state = read_state(target)
    remark = f" Kaggle says: {message}" if message else ""
    if status == "cancel acknowledged":
        return Collected(Outcome.INFRASTRUCTURE, f"the session was cancelled.{remark}")
    if _NO_MEMORY in message + log and (state is None or state.state == "running"):
        again = "memory ran out, and in another session of this machine it would again: take smaller settings"
        return Collected(Outcome.FAIL, f"{again}.{remark}")
    if state is None and (target / STATE).exists():
        return Collected(Outcome.FAIL, f"{STATE} came home damaged, and says how the run ended; collect it again.")
    if state is None:
        return _classify_by_log(status, remark, log)
    if state.state == "failed":
        outcome = Outcome.INFRASTRUCTURE if state.kind == _OF_THE_MACHINE else Outcome.FAIL
        return Collected(outcome, f"{state.stage or 'the series'} failed: {state.sentence}")
    if state.state == "done" and status == "error":
        stopped = f"the series is done, but the notebook stopped after it: {last_line(log, 'nothing')}"
        return Collected(Outcome.FAIL, stopped)
    if state.state == "running" or status == "error":
        cut_off = "the session ended in the middle of the work, by its time limit or by a fault of the machine"
        return Collected(Outcome.INFRASTRUCTURE, f"{cut_off}.{remark}")
    try:
        return _compare_with_manifest(target, state)
    except RunDirError as error:
        return Collected(Outcome.FAIL, str(error))


def _compare_with_manifest(target: Path, state: SeriesState) -> Collected:
    """The outcome of a run that ended as it should: every file on record is there."""
    if wrong := altered_files(target):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return Collected(Outcome.FAIL, f"the output is not what the run wrote: {wrong[0]}{more}; collect it again.")
    if state.state == "continue":
        return Collected(Outcome.CONTINUE, f"to be continued at {state.stage}: {state.sentence}.")
    compared = (target / "comparison" / "metrics.json").exists()
    return Collected(Outcome.PASS, read_sentence(target) if compared else "the series is done, without a comparison.")


def _classify_by_log(status: str, remark: str, log: str) -> Collected:
    """A kernel that never came to the series: a Python error is the notebook's fault, all else the platform's."""
    if errors := _ERROR.findall(log):
        kind, sentence = errors[-1]
        if kind == _OF_THE_MACHINE:
            return Collected(Outcome.INFRASTRUCTURE, sentence)
        return Collected(Outcome.FAIL, f"the notebook stopped before the series began: {kind}: {sentence}")
    ended = "the kernel was saved and not run, or kept no output."
    if status != "complete":
        ended = f"the session ended before the series began. Its log ends with: {last_line(log, 'nothing')}"
    return Collected(Outcome.INFRASTRUCTURE, f"{ended}{remark}")


def show(collected: Collected, reference: str, target: Path, console: Console) -> None:
    """The outcome in one line, and what to do next."""
    colour = {Outcome.PASS: "green", Outcome.FAIL: "red"}.get(collected.outcome, "yellow")
    console.print(Text.assemble((collected.outcome.name.lower(), colour), f": {collected.sentence}"))
    if collected.outcome == Outcome.PASS:
        upload = command("publish", target, "--repo", "USER/NAME")
        console.print(f"look at {target / 'report' / 'index.html'}; upload it: {upload}")
        return
    console.print(f"  {page(reference)}")
    if collected.resumable:
        owner, slug = split_reference(reference)
        again = command("push", "--continue", "--username", owner, "--slug", slug)
        console.print(f"resume it{'' if collected.outcome == Outcome.CONTINUE else ', once that is mended'}: {again}")
