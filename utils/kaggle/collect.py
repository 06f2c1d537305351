"""Bring a kernel's log and output home, compare them with the manifest, and say how the run ended.

The Kaggle package's own download takes an error page for a file and writes wherever a file's name points, so its
listing is used here and the files are fetched, checked and put in place by this module.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.markup import escape

from utils.config import read_config
from utils.errors import InfrastructureError, RunDirError
from utils.evaluation.results import read_sentence
from utils.files import atomic, parse_json, relative_name, sha256, write_text
from utils.kaggle.api import FINISHED, TIMEOUT_S, Kaggle, explain, page, passes, split_reference
from utils.kaggle.retry import repeat
from utils.pipeline.run_dir import CONFIG, altered_files, read_manifest
from utils.pipeline.stages import STAGES
from utils.pipeline.state import FILE as STATE
from utils.pipeline.state import SeriesState, read_state
from utils.schema import Config
from utils.secrets import redact

_OF_THE_MACHINE = (
    "HardwareError",
    "PinError",
)  # the session lacked what the run asks for; the run itself is not judged
_CHUNK = 1 << 20


class Verdict(IntEnum):
    """What the exit status says; `CONTINUE` is a session that ended itself in time, before the work was done."""

    PASS = 0
    FAIL = 1
    INFRASTRUCTURE = 3
    CONTINUE = 4


@dataclass(frozen=True)
class Collected:
    """How a kernel's last session ended, in one word and one sentence; `state` is the run's own account of it."""

    verdict: Verdict
    sentence: str
    state: SeriesState | None = None


def collect(kaggle: Kaggle, reference: str, target: Path, console: Console) -> Collected:
    """Fetch log and output of the last session into `target`, a run directory, and judge them.

    What is there already with the digest on record is not fetched again. Raises InfrastructureError and KaggleError
    where Kaggle cannot be asked.
    """
    status, message = kaggle.status(reference)
    if status not in FINISHED:
        word = status.replace("_", " ").lower()
        return Collected(
            Verdict.INFRASTRUCTURE, f"{reference} has not ended yet ({word}); collect it later, or push --wait."
        )
    files, log = kaggle.outputs(reference)
    target.mkdir(parents=True, exist_ok=True)
    (target / STATE).unlink(missing_ok=True)  # an earlier session's would be taken for this one's
    log_file = target / f"{split_reference(reference)[1]}.log"
    text = redact(readable_log(log))
    write_text(log_file, text)
    fetched = fetch(kaggle, files, target, console)
    console.print(f"{fetched} file(s) and the log are in {target}", highlight=False, soft_wrap=True, markup=False)
    return judge(status, message, target, text)


def peek(kaggle: Kaggle, reference: str) -> tuple[SeriesState | None, Config | None]:
    """(state, settings) of the last session's output, without the rest of it; None for what it did not leave."""
    files, _ = kaggle.outputs(reference)
    inside = run_folder(files)
    if inside is None:
        return None, None
    with tempfile.TemporaryDirectory() as scratch:
        for name in (STATE, CONFIG):
            whole = (PurePosixPath(inside) / name).as_posix()
            if whole in files:
                _download(kaggle, files[whole], Path(scratch) / name, name)
        config = Path(scratch) / CONFIG
        return read_state(Path(scratch)), read_config(config) if config.exists() else None


def fetch(kaggle: Kaggle, files: dict[str, str], target: Path, console: Console) -> int:
    """Put the output's run directory into `target` and what lies beside it into target/kernel; returns how many files.

    The manifest comes first: files that are here already as it says are left alone.
    """
    inside = run_folder(files)
    placed = {name: _place(name, inside, target) for name in files}
    for name in sorted(files, key=lambda name: (PurePosixPath(name).name != "manifest.json", name)):
        path = placed[name]
        known = _recorded(target).get(path.relative_to(target).as_posix())
        if known and path.is_file() and sha256(path) == known["sha256"]:
            continue
        _download(kaggle, files[name], path, name)
    return len(files)


def run_folder(files: dict[str, str]) -> str | None:
    """The folder of the output that is a run directory: the one whose manifest.json lies highest; None without one."""
    manifests = [PurePosixPath(name) for name in files if PurePosixPath(name).name == "manifest.json"]
    manifests = [path for path in manifests if path.parent.parts[:1] == ("runs",) or len(path.parts) == 1]
    if len(manifests) > 1:
        raise RunDirError(
            f"The output holds {len(manifests)} runs ({', '.join(str(path.parent) for path in manifests)}); expected one."
        )
    return manifests[0].parent.as_posix() if manifests else None


def _place(name: str, inside: str | None, target: Path) -> Path:
    """Where a file of the output goes; a name that points out of `target` is refused."""
    relative = relative_name(name)
    if relative is None:
        raise InfrastructureError(
            f"Kaggle lists an output called {name!r}, which points outside or is no file name; nothing was fetched."
        )
    if inside is not None and relative.is_relative_to(inside):
        return target / relative.relative_to(inside)
    return target / "kernel" / relative


def _recorded(target: Path) -> dict[str, dict]:
    try:
        stages = read_manifest(target).get("stages", {})
    except RunDirError:
        return {}
    return {name: entry for record in stages.values() for name, entry in record.get("outputs", {}).items()}


def _download(kaggle: Kaggle, address: str, path: Path, name: str) -> None:
    """One file, whole or not at all, repeated where the connection breaks or breaks off."""
    import requests

    def attempt() -> None:
        with requests.get(address, stream=True, timeout=TIMEOUT_S) as answer:
            answer.raise_for_status()
            expected, size = answer.headers.get("Content-Length"), 0
            with atomic(path) as scratch, scratch.open("wb") as stream:
                for chunk in answer.iter_content(_CHUNK):
                    size += stream.write(chunk)
                if expected and not answer.headers.get("Content-Encoding") and size != int(expected):
                    raise requests.ConnectionError(f"{size} of {expected} bytes arrived")

    repeat(attempt, passes, explain, f"fetching {name}", kaggle.say)


def readable_log(log: str) -> str:
    """Kaggle's log (a JSON list of stream, time and data) as the text that was printed; anything else as it is."""
    try:
        entries = parse_json(log)
        return "".join(str(entry["data"]) for entry in entries)
    except (ValueError, TypeError, KeyError):
        return log


def judge(status: str, message: str, target: Path, log: str) -> Collected:
    """The verdict from Kaggle's status, the run's own state, its manifest and, where there is neither, the log."""
    state = read_state(target)
    told = f" Kaggle says: {message}" if message else ""
    if status == "CANCEL_ACKNOWLEDGED":
        return Collected(Verdict.INFRASTRUCTURE, f"the session was cancelled.{told}", state)
    if state is None and (target / STATE).exists():
        return Collected(Verdict.FAIL, f"{STATE} came home damaged, and says how the run ended; collect it again.")
    if state is None:
        return _judge_without_state(status, told, log)
    if state.state == "failed":
        verdict = Verdict.INFRASTRUCTURE if state.kind in _OF_THE_MACHINE else Verdict.FAIL
        return Collected(verdict, f"{state.stage or 'the series'} failed: {state.sentence}", state)
    if state.state == "done" and status == "ERROR":
        return Collected(
            Verdict.FAIL, f"the series is done, but the notebook stopped after it: {_last_line(log)}", state
        )
    if state.state == "running" or status == "ERROR":
        sentence = f"the session ended in the middle of the work, by its time limit or by a fault of the machine.{told}"
        return Collected(Verdict.INFRASTRUCTURE, sentence, state)
    try:
        wrong = altered_files(target)
        stages = read_manifest(target).get("stages", {})
    except RunDirError as error:
        return Collected(Verdict.FAIL, str(error), state)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return Collected(
            Verdict.FAIL, f"the output is not what the run wrote: {wrong[0]}{more}; collect it again.", state
        )
    if state.state == "continue":
        return Collected(Verdict.CONTINUE, f"to be continued at {state.stage}: {state.sentence}.", state)
    undone = [stage.name for stage in STAGES if stages.get(stage.name, {}).get("state", "done") != "done"]
    if undone or not stages:
        return Collected(
            Verdict.FAIL, f"the run calls itself done, but {', '.join(undone) or 'no stage'} is not.", state
        )
    try:
        return Collected(Verdict.PASS, _outcome(target, stages), state)
    except RunDirError as error:
        return Collected(Verdict.FAIL, str(error), state)


def _judge_without_state(status: str, told: str, log: str) -> Collected:
    """The kernel never came to the series: a Python error of the notebook is its fault, anything else the platform's."""
    errors = re.findall(r"(?m)^(?:[\w.]+\.)?(\w*(?:Error|Exception|Stopped)): (.*)$", log)
    if errors and errors[-1][0] not in _OF_THE_MACHINE:
        kind, sentence = errors[-1]
        return Collected(Verdict.FAIL, f"the notebook stopped before the series began: {kind}: {sentence}")
    if errors:
        return Collected(Verdict.INFRASTRUCTURE, errors[-1][1])
    if status == "COMPLETE":
        return Collected(Verdict.INFRASTRUCTURE, f"the kernel was saved and not run, or kept no output.{told}")
    return Collected(
        Verdict.INFRASTRUCTURE, f"the session ended before the series began.{told} Its log ends with: {_last_line(log)}"
    )


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "nothing")


def _outcome(target: Path, stages: dict) -> str:
    if "04_comparison" not in stages or not (target / "comparison" / "metrics.json").exists():
        return f"{', '.join(stages)} done."
    return read_sentence(target)


def default_target(reference: str) -> Path:
    """runs/kaggle-SLUG below the current directory."""
    return Path.cwd() / "runs" / f"kaggle-{split_reference(reference)[1]}"


def say(collected: Collected, reference: str, console: Console) -> None:
    """The verdict in one line, and where to look."""
    colour = {Verdict.PASS: "green", Verdict.FAIL: "red"}.get(collected.verdict, "yellow")
    word = collected.verdict.name.lower()
    console.print(f"[{colour}]{word}[/{colour}]: {escape(collected.sentence)}", highlight=False, soft_wrap=True)
    if collected.verdict != Verdict.PASS:
        console.print(f"  {page(reference)}", highlight=False, soft_wrap=True)
