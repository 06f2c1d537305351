"""The end of a session on Kaggle: light results stay in the kernel's output, what is heavy moves to scratch.

Kaggle saves /kaggle/working (20 GB at most) and nothing else; a merged 8B model has 16 GB, and nobody fetches it by hand.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from utils.errors import UserError
from utils.files import list_files
from utils.hardware import GIB, where
from utils.pipeline.state import SeriesState, read_state, write_state
from utils.pipeline.time_limit import session_started
from utils.project import KAGGLE, NAME

KEPT_GIB = 1.0  # a folder below export/ that has more goes to scratch, whole: half a model looks like a model


class SeriesStopped(UserError):
    """The series inside a kernel notebook failed; its sentence says where."""


def hand_over(run_dir: str | Path, limit_gib: float = KEPT_GIB) -> SeriesState:
    """Record how the series ended, move what is heavy out of a Kaggle kernel's output, and list what is left.

    Raises SeriesStopped where the series failed, after all that.
    """
    run_dir = Path(run_dir)
    began = (run_dir / "manifest.json").exists()
    state = read_state(run_dir) or SeriesState(
        state="running" if began else "failed",
        sentence="it never began; the lines above say why.",
        started=session_started(),
    )
    if state.state == "running":
        died = "its process died, most often because memory ran out."
        state = state.model_copy(update={"state": "failed", "kind": "killed", "sentence": died})
    write_state(run_dir, state)
    leave_heavy(run_dir, state.state == "done", limit_gib)
    _list(run_dir)
    if state.state == "failed":
        raise SeriesStopped(
            f"{state.stage or 'The series'} failed: {state.sentence} What finished is kept in {run_dir}."
        )
    return state


def leave_heavy(run_dir: str | Path, done: bool = False, limit_gib: float = KEPT_GIB) -> dict[str, int]:
    """On Kaggle, move heavy exports, and the checkpoints of a run that is done, out of the output: {folder: bytes}.

    What moved is noted in state.json, so that nobody misses it afterwards.
    """
    run_dir = Path(run_dir)
    if where() != "kaggle" or not run_dir.resolve().is_relative_to((KAGGLE / "working").resolve()):
        return {}
    candidates = [path for path in sorted((run_dir / "export").glob("*")) if path.is_dir() and path.name != "adapter"]
    heavy = {path: size for path in candidates if (size := _size(path)) > limit_gib * GIB}
    checkpoints = run_dir / "training" / "checkpoints"
    if done and checkpoints.is_dir():
        heavy[checkpoints] = _size(checkpoints)
    moved = {}
    for path, size in heavy.items():
        name = path.relative_to(run_dir).as_posix()
        target = scratch_dir(run_dir) / name
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
        moved[name] = size
        print(f"{name} ({size / GIB:.1f} GiB) is in {target} until this session ends; the output keeps the rest")
    if moved:
        state = read_state(run_dir) or SeriesState(state="done")
        write_state(run_dir, state.model_copy(update={"left_in_scratch": state.left_in_scratch | moved}))
    return moved


def scratch_dir(run_dir: Path) -> Path:
    """Where a run's heavy folders go: /kaggle/temp is not saved."""
    base = KAGGLE / "temp" if KAGGLE.is_dir() else Path(tempfile.gettempdir())
    return base / NAME / run_dir.name


def _list(run_dir: Path) -> None:
    files = list_files(run_dir, ".") if run_dir.is_dir() else []
    sizes: dict[str, list[int]] = {}
    for path in files:
        sizes.setdefault(path.relative_to(run_dir).parts[0], []).append(path.stat().st_size)
    print(f"{run_dir} holds {sum(map(sum, sizes.values())) / 2**20:.1f} MiB:")
    for name, each in sizes.items():
        print(f"  {name:<18} {len(each):>4} file(s) {sum(each) / 2**20:>9.1f} MiB")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
