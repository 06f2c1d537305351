"""What a run directory's manifest.json records, read back: whole or not at all, and compared with the files themselves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from utils.errors import RunDirError
from utils.files import sha256
from utils.stages import Stage
from utils.state import read_state


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the run directory `path`; empty where there is none yet.

    Raises RunDirError where the file is there and cannot be read.
    """
    file = path / "manifest.json"
    if not file.exists():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or "profile" not in manifest:
            raise ValueError("no profile")
        return manifest
    except (ValueError, OSError) as error:
        raise RunDirError(
            f"{file} cannot be read ({error}); restore it, or take a new --run-dir: nothing was changed."
        ) from None


def altered_files(path: Path) -> list[str]:
    """Rehash every output on record and name those that are missing or differ; an empty list is a clean bill.

    What state.json says stayed in a session's scratch is not missed.
    """
    altered, state = [], read_state(path)
    for record in read_manifest(path).get("stages", {}).values():
        for name, entry in record.get("outputs", {}).items():
            file = path / name
            if not file.is_file():
                if state is None or not state.left(name):
                    altered.append(f"{name} is missing")
            elif sha256(file) != entry["sha256"]:
                altered.append(f"{name} differs from what was written")
    return altered


def notebook_digest(stage: Stage) -> str:
    """sha256 over the notebook's cell sources, blind to outputs and ids; empty where it is not beside us."""
    if not stage.notebook.exists():
        return ""
    cells = json.loads(stage.notebook.read_text(encoding="utf-8"))["cells"]
    return hashlib.sha256("\0".join("".join(cell["source"]) for cell in cells).encode()).hexdigest()
