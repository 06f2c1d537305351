"""An earlier session's run directory among what is attached to a Kaggle notebook, wherever it is mounted.

Today's layout is /kaggle/input/notebooks/OWNER/SLUG/… (or datasets/OWNER/SLUG/…), the older one /kaggle/input/SLUG/…;
both are still met, so the manifest is searched for and no path is taken for granted.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from utils.errors import RunDirError
from utils.files import sha256
from utils.hardware import default_profile
from utils.pipeline.run_dir import read_manifest
from utils.pipeline.state import FILE as STATE
from utils.project import KAGGLE, runs_dir

DEPTH = 6  # input/notebooks/OWNER/SLUG/runs/PROFILE
WIDTH = 1_000


def find_attached(profile: str = "auto", root: Path | None = None) -> Path | None:
    """The run directory of `profile` below the attached inputs, None where there is none.

    Raises RunDirError where there are several different ones, or a damaged one.
    """
    root = root or KAGGLE / "input"
    found: dict[str, Path] = {}
    for manifest in _manifests(root):
        known = read_manifest(manifest.parent)
        if profile in ("auto", known["profile"]):
            found.setdefault(sha256(manifest), manifest.parent)  # one output can be mounted twice
    if len(found) > 1:
        places = ", ".join(str(path.relative_to(root)) for path in found.values())
        raise RunDirError(
            f"{len(found)} different runs are attached ({places}); detach all but the one to go on with, or name its "
            "copy in RUN_DIR."
        )
    return next(iter(found.values()), None)


def _manifests(root: Path) -> Iterator[Path]:
    """Our manifest.json files, level by level: at most DEPTH levels, and no folder of more than WIDTH entries."""
    level = [root]
    for _ in range(DEPTH):
        below: list[Path] = []
        for folder in level:
            try:
                entries = sorted(islice(folder.iterdir(), WIDTH + 1))
            except OSError:
                continue
            manifest = folder / "manifest.json"
            if manifest in entries and _is_ours(manifest):
                yield manifest
            elif len(entries) <= WIDTH:  # more is somebody's image collection: ours lie in small folders
                below += [entry for entry in entries if entry.is_dir()]
        level = below


def _is_ours(manifest: Path) -> bool:
    try:
        return bool(read_manifest(manifest.parent))
    except RunDirError:
        if all(word in manifest.read_bytes() for word in (b'"profile"', b'"stages"')):
            raise  # ours, and damaged: to start anew without a word would throw an earlier session's work away
        return False  # somebody else's manifest.json


def adopt_attached(profile: str = "auto", run_dir: str | Path = "", root: Path | None = None) -> Path:
    """The run directory to work in: `run_dir`, or the default one; filled from an attached run while it is empty.

    Attached inputs cannot be written to, so the run is copied. Raises RunDirError as `find_attached` does.
    """
    attached = find_attached(profile, root) if not run_dir or not read_manifest(Path(run_dir)) else None
    if run_dir:
        target = Path(run_dir)
    else:
        name = read_manifest(attached)["profile"] if attached else default_profile() if profile == "auto" else profile
        base = runs_dir() if KAGGLE.joinpath("working").is_dir() else Path.cwd() / "runs"
        target = base / name
    if attached and not read_manifest(target):
        partial = target.with_name(f".{target.name}.copying")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(attached, partial)
        for path in (partial, *partial.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)  # the mount's are read-only
        (partial / STATE).unlink(missing_ok=True)  # that was the other session's
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        print(f"going on with {attached}, copied to {target}")
    return target.resolve()
