"""Both ends of a session on Kaggle: resume what an earlier one left, and leave what the next one can resume."""

import shutil
import stat
from pathlib import Path

from utils.errors import RunDirError, UserError
from utils.files import atomic_folder, sha256
from utils.hardware import default_profile, where
from utils.pipeline.run_dir import STATE, SeriesState, read_manifest, read_state, write_state
from utils.project import KAGGLE, ROOT, runs_dir

DEPTH = 5  # notebooks/OWNER/SLUG/runs/PROFILE


def is_ours(manifest: Path) -> bool:
    """Whether this series wrote a manifest.json, damaged as it may be."""
    return all(word in manifest.read_bytes() for word in (b'"profile"', b'"stages"'))


def find_attached(profile: str = "auto", root: Path | None = None) -> Path | None:
    """The run directory of `profile` among the inputs, or None; raises RunDirError for several, or a damaged one."""
    root, found = root or KAGGLE / "input", {}
    for file in (file for depth in range(DEPTH + 1) for file in root.glob("*/" * depth + "manifest.json")):
        try:
            manifest = read_manifest(file.parent)
        except RunDirError:
            if is_ours(file):
                raise  # and damaged: to start anew would throw an earlier session's work away
            continue  # somebody else's manifest.json
        if profile in ("auto", manifest["profile"]):
            found.setdefault(sha256(file), file.parent)  # one output can be mounted twice
    if len(found) > 1:
        places = ", ".join(str(path.relative_to(root)) for path in found.values())
        raise RunDirError(f"{len(found)} different runs are attached ({places}); detach all but the one to resume.")
    return next(iter(found.values()), None)


def resume_from_attached(profile: str = "auto", run_dir: str | Path = "", root: Path | None = None) -> Path:
    """The run directory to work in, without state.json: `run_dir`, or the default one; while empty a copy of the attached."""
    attached = None if run_dir and read_manifest(Path(run_dir)) else find_attached(profile, root)
    if run_dir:
        target = Path(run_dir)
    else:
        name = read_manifest(attached)["profile"] if attached else default_profile() if profile == "auto" else profile
        kept = runs_dir()  # beside the unpacked package nothing would be found
        target = (Path.cwd() / "runs" if kept.is_relative_to(ROOT) else kept) / name
    if attached and not read_manifest(target):
        with atomic_folder(target) as scratch:
            shutil.copytree(attached, scratch, dirs_exist_ok=True)
            for path in (scratch, *scratch.rglob("*")):
                path.chmod(path.stat().st_mode | stat.S_IWUSR)  # the mount's are read-only
        print(f"resuming {attached}, copied to {target}")
    (target / STATE).unlink(missing_ok=True)
    return target.resolve()


def finish_session(run_dir: str | Path) -> SeriesState:
    """Record how the series ended in a kernel, without checkpoints when done; raises UserError where it failed."""
    run_dir = Path(run_dir)
    state = read_state(run_dir)
    if state is None:
        state = SeriesState(state="failed", sentence="it never began; what it printed says why.")
    elif state.state == "running":
        state = SeriesState(state="failed", kind="killed", sentence="it died, most often because memory ran out.")
    write_state(run_dir, state)
    if state.state == "failed":
        raise UserError(f"{state.stage or 'The series'} failed: {state.sentence} What finished is kept in {run_dir}.")
    if state.state == "done" and where() == "kaggle":
        shutil.rmtree(run_dir / "training" / "checkpoints", ignore_errors=True)
    return state
