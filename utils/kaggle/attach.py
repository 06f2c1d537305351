"""Both ends of a session on Kaggle: resume what an earlier one left, and leave what the next one can resume.

Kaggle saves /kaggle/working (20 GB at most) and nothing else; attached outputs are read-only. They are mounted at
/kaggle/input/notebooks/OWNER/SLUG/… (or datasets/OWNER/SLUG/…) and, in the older layout, at /kaggle/input/SLUG/…, so the
manifest is searched for and no path is taken for granted.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from utils.errors import RunDirError, UserError
from utils.files import atomic_folder, sha256
from utils.hardware import GIB, default_profile, where
from utils.pipeline.run_dir import read_manifest
from utils.pipeline.state import FILE as STATE
from utils.pipeline.state import SeriesState, read_state, write_state
from utils.project import KAGGLE, NAME, runs_dir

DEPTH = 5  # notebooks/OWNER/SLUG/runs/PROFILE
WIDTH = 1_000  # a folder of more files is somebody's image collection
KEPT_GIB = 1.0  # a folder below export/ that has more leaves the output, whole: half a model looks like a model


class SeriesStopped(UserError):
    """The series inside a kernel notebook failed; its sentence says where."""


def find_attached(profile: str = "auto", root: Path | None = None) -> Path | None:
    """The run directory of `profile` below the attached inputs, None where there is none.

    Raises RunDirError where there are several different ones, or a damaged one.
    """
    root = root or KAGGLE / "input"
    found: dict[str, Path] = {}
    for run in _run_directories(root):
        if profile in ("auto", read_manifest(run)["profile"]):
            found.setdefault(sha256(run / "manifest.json"), run)  # one output can be mounted twice
    if len(found) > 1:
        places = ", ".join(str(path.relative_to(root)) for path in found.values())
        raise RunDirError(
            f"{len(found)} different runs are attached ({places}); detach all but the one to resume, or name its copy in RUN_DIR."
        )
    return next(iter(found.values()), None)


def _run_directories(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        path = Path(folder)
        ours = "manifest.json" in files and _is_ours(path)
        if ours:
            yield path
        below[:] = (
            sorted(below) if not ours and len(files) <= WIDTH and len(path.relative_to(root).parts) < DEPTH else []
        )


def _is_ours(run: Path) -> bool:
    try:
        return bool(read_manifest(run))
    except RunDirError:
        if all(word in (run / "manifest.json").read_bytes() for word in (b'"profile"', b'"stages"')):
            raise  # ours, and damaged: to start anew would throw an earlier session's work away
        return False  # somebody else's manifest.json


def resume_from_attached(profile: str = "auto", run_dir: str | Path = "", root: Path | None = None) -> Path:
    """The run directory to work in: `run_dir`, or the default one; a copy of the attached run while it is empty.

    Raises RunDirError as `find_attached` does.
    """
    attached = None if run_dir and read_manifest(Path(run_dir)) else find_attached(profile, root)
    if run_dir:
        target = Path(run_dir)
    else:
        name = read_manifest(attached)["profile"] if attached else default_profile() if profile == "auto" else profile
        target = (runs_dir() if KAGGLE.joinpath("working").is_dir() else Path.cwd() / "runs") / name
    if attached and not read_manifest(target):
        with atomic_folder(target) as scratch:
            shutil.copytree(attached, scratch, dirs_exist_ok=True)
            for path in (scratch, *scratch.rglob("*")):
                path.chmod(path.stat().st_mode | stat.S_IWUSR)  # the mount's are read-only
            (scratch / STATE).unlink(missing_ok=True)  # that was the other session's
        print(f"resuming {attached}, copied to {target}")
    return target.resolve()


def finish_session(run_dir: str | Path, limit_gib: float = KEPT_GIB) -> SeriesState:
    """Record how the series ended, and move what is large out of a Kaggle kernel's output.

    Raises SeriesStopped where the series failed, after that.
    """
    run_dir = Path(run_dir)
    began = (run_dir / "manifest.json").exists()
    unknown = SeriesState(state="running" if began else "failed", sentence="it never began; the lines above say why.")
    state = read_state(run_dir) or unknown
    if state.state == "running":
        died = "its process died, most often because memory ran out."
        state = state.model_copy(update={"state": "failed", "kind": "killed", "sentence": died})
    write_state(run_dir, state)
    move_large_files(run_dir, state.state == "done", limit_gib)
    if state.state == "failed":
        raise SeriesStopped(
            f"{state.stage or 'The series'} failed: {state.sentence} What finished is kept in {run_dir}."
        )
    return state


def move_large_files(run_dir: str | Path, done: bool = False, limit_gib: float = KEPT_GIB) -> dict[str, int]:
    """On Kaggle, move large exports, and the checkpoints of a run that is done, out of the output: {folder: bytes}.

    They are in /kaggle/temp until the session ends; state.json names them, so that nobody misses them afterwards.
    """
    run_dir = Path(run_dir)
    if where() != "kaggle" or not run_dir.resolve().is_relative_to((KAGGLE / "working").resolve()):
        return {}
    exports = [path for path in sorted((run_dir / "export").glob("*")) if path.is_dir() and path.name != "adapter"]
    large = {path: size for path in exports if (size := _size(path)) > limit_gib * GIB}
    checkpoints = run_dir / "training" / "checkpoints"
    if done and checkpoints.is_dir():
        large[checkpoints] = _size(checkpoints)
    moved = {path.relative_to(run_dir).as_posix(): size for path, size in large.items()}
    for name, size in moved.items():
        target = KAGGLE / "temp" / NAME / run_dir.name / name
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(run_dir / name, target)
        print(f"{name} ({size / GIB:.1f} GiB) is in {target} until this session ends; the output keeps the rest")
    if moved:
        state = read_state(run_dir) or SeriesState(state="done")
        write_state(run_dir, state.model_copy(update={"left_in_scratch": state.left_in_scratch | moved}))
    return moved


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
