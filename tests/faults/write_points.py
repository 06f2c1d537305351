"""A full disk at every single write of a stage: `python -m tests.faults.write_points RUN STAGE SCRATCH [continue]`.

The stage's cells are executed once in a forked process that notes every opening for writing below the run directory;
then once for each of these, and from that opening on no file on the machine can grow beyond some bytes (RLIMIT_FSIZE),
whichever library writes it. Prints one JSON object a line, the last one with all call sites in `utils` that wrote.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import nbformat

from utils.files import write_json
from utils.pipeline.run_dir import read_manifest
from utils.pipeline.stages import STAGES, Stage, find_stage
from utils.project import ROOT

LIMIT = 10  # bytes: enough to begin a file and too few to end one
SETTINGS = {"train.save_steps": 16, "train.max_steps": 16}  # one checkpoint: every kind of write, not every step
WRITING = os.O_WRONLY | os.O_RDWR


class Points:
    """Counts what is opened for writing below `run`; at number `fatal` the disk is full."""

    def __init__(self, run: Path, fatal: int | None):
        self.run, self.fatal = str(run), fatal
        self.seen: list[str] = []
        self.sites: set[str] = set()
        self.on = True

    def watch(self) -> None:
        sys.addaudithook(self._hook)
        _announce_native_writers(self)

    def _hook(self, event: str, arguments: tuple) -> None:
        if event == "open" and self.on and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self.note(arguments[0])

    def note(self, place) -> None:
        """One more file is opened for writing."""
        if isinstance(place, int) or not os.fsdecode(place).startswith(self.run):
            return
        self.sites |= {
            _site(frame.filename, frame.name) for frame in traceback.extract_stack() if _is_ours(frame.filename)
        }
        self.seen.append(os.path.relpath(os.fsdecode(place), self.run))
        if len(self.seen) - 1 == self.fatal:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))

    def end(self) -> None:
        """There is space again."""
        self.on = False
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(ROOT / "utils")


def _site(file: str, function: str) -> str:
    return f"{Path(file).stem}.{function}"


def _announce_native_writers(points: Points) -> None:
    """What opens files without Python's knowledge says so beforehand."""
    import pandas as pd
    import safetensors.torch
    import torch
    from transformers import PreTrainedTokenizerFast

    def announced(function, place):
        def call(*args, **kwargs):
            points.note(place(*args, **kwargs))
            return function(*args, **kwargs)

        return call

    def saved_to(_, file, *args, **kwargs):
        return file if isinstance(file, str | os.PathLike) else 0

    safetensors.torch.serialize_file = announced(safetensors.torch.serialize_file, lambda _, file, *a, **k: file)
    torch.save = announced(torch.save, saved_to)
    pd.DataFrame.to_parquet = announced(pd.DataFrame.to_parquet, lambda _, path, *a, **k: path)
    PreTrainedTokenizerFast._save_pretrained = announced(
        PreTrainedTokenizerFast._save_pretrained,
        lambda _, save_directory, *a, **k: Path(save_directory, "tokenizer.json"),
    )


def before(stage: Stage, source: Path, target: Path) -> None:
    """A copy of the run as it was before `stage`."""
    shutil.copytree(source, target)
    later = STAGES[STAGES.index(stage) :]
    for name in [name for one in later for name in (*one.outputs, *one.optional)] + ["report", "training/checkpoints"]:
        place = target / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    manifest = read_manifest(target)
    for one in later:
        manifest["stages"].pop(one.name)
    write_json(target / "manifest.json", manifest)


def execute(stage: Stage, run: Path) -> None:
    """The notebook's cells, one after the other, in this process."""
    cells = [cell for cell in nbformat.read(stage.notebook, as_version=4).cells if cell.cell_type == "code"]
    names = {"PROFILE": "demo", "RUN_DIR": str(run), "OVERRIDES": SETTINGS, "display": lambda *_: None}
    for cell in cells[2:]:  # after bootstrap and parameters
        exec(compile(cell.source, f"<{stage.name}>", "exec"), names)


def load_back_here() -> None:
    """05 loads its exports in a fresh process, whose imports would take longer than everything else here."""
    from utils.export import verify

    @contextlib.contextmanager
    def here(command: list, *_):
        verify.answer(Path(command[-1]))
        yield SimpleNamespace(wait=lambda: 0)

    verify.Child = here


def drive(run: Path) -> None:
    """What the driver writes itself, where every stage is done."""
    from rich.console import Console

    from utils.__main__ import conclude
    from utils.pipeline.runner import run_series

    run_series(
        "demo", run, {}, console=Console(file=io.StringIO()), conclude=lambda run, worked: conclude(run, worked, 0)
    )


def attempt(stage: Stage | None, run: Path, fatal: int | None, again: bool) -> dict:
    """One execution; what was found afterwards."""
    from utils.errors import UserError
    from utils.files import disk_error
    from utils.pipeline.run_dir import altered_files, read_manifest

    points = Points(run, fatal)
    points.watch()
    found = {"fatal": fatal, "error": "", "told": "", "wrong": []}
    work = (lambda: execute(stage, run)) if stage else (lambda: drive(run))
    quiet = contextlib.redirect_stdout(io.StringIO())
    try:
        with quiet:
            work()
    except BaseException as error:
        told = error if isinstance(error, UserError) else disk_error(error, run)
        found |= {"error": f"{type(error).__name__}: {error}"[:300], "told": str(told or "")}
        found["where"] = traceback.format_exc()[-1500:] if told is None else ""
    points.end()
    found["point"] = points.seen[fatal] if fatal is not None and fatal < len(points.seen) else ""
    if fatal is None:
        return {"points": points.seen, "sites": sorted(points.sites), "error": found["error"], **found}
    done = [name for name, record in read_manifest(run)["stages"].items() if record["state"] == "done"]
    checks = {
        "no sentence": not found["told"] or "\n" in found["told"],
        "done all the same": stage is not None and stage.name in done,
        "an earlier result was harmed": bool(altered_files(run)),
        "scratch was left": bool([*run.rglob(".*.tmp")]),
    }
    if again:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                work()
        except BaseException:
            checks[f"with space it does not go on: {traceback.format_exc()[-600:]}"] = True
    found["wrong"] = [name for name, is_so in checks.items() if is_so]
    return found


def in_fork(function, *arguments) -> dict:
    """`function` in a process of its own, which shares what this one has imported."""
    readable, writable = os.pipe()
    if child := os.fork():
        os.close(writable)
        with os.fdopen(readable) as stream:
            said = stream.read()
        os.waitpid(child, 0)
        return json.loads(said)
    try:
        answer = json.dumps(function(*arguments))
    except BaseException:
        answer = json.dumps({"wrong": [traceback.format_exc()]})
    with os.fdopen(writable, "w") as stream:
        stream.write(answer)
    os._exit(0)


def import_all() -> None:
    """What the cells import, once for all forks."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import trl

    assert trl.SFTTrainer and trl.SFTConfig  # lazy until they are asked for


def main(source: Path, number: str, scratch: Path, again: bool) -> None:
    import_all()
    load_back_here()
    stage = None if number == "driver" else find_stage(number)
    base = scratch / "base"
    if stage:
        before(stage, source, base)
    else:
        shutil.copytree(source, base)
        for page in (base / "report").glob("*.html"):
            page.unlink()
    place = scratch / "trial"  # the same for all: nothing may rest on the name

    def trial(fatal: int | None) -> dict:
        shutil.copytree(base, place)
        try:
            return in_fork(attempt, stage, place, fatal, again)
        finally:
            shutil.rmtree(place)

    whole = trial(None)
    for fatal in range(len(whole.get("points", []))):
        print(json.dumps(trial(fatal)), flush=True)
    print(json.dumps(whole), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), again="continue" in sys.argv)
