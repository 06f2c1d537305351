"""What a run directory's manifest.json records, read back: whole or not at all, and compared with the files themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, StrictStr, ValidationError

from utils.errors import RunDirError
from utils.files import parse_json, relative_name, sha256
from utils.pipeline.stages import BY_NAME, Stage, ancestors
from utils.pipeline.state import read_state
from utils.project import command
from utils.sealed import open_seal


def _below(name: str) -> str:
    """A file's name as the manifest has it: one that points out of the run directory would be read, and uploaded."""
    if relative_name(name) is None:
        raise ValueError(f"{name!r} does not lie below the run directory")
    return name


def _stage(name: str) -> str:
    if name not in BY_NAME:
        raise ValueError(f"{name!r} is no stage of the series")
    return name


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class _File(_Part):
    sha256: StrictStr
    bytes: int = 0
    mtime_ns: int = 0


_Files = dict[Annotated[str, AfterValidator(_below)], _File]


class _Record(_Part):
    state: str = ""
    settings: dict[str, Any] = {}
    notebook: str = ""
    inputs: _Files = {}
    outputs: _Files = {}
    seconds: float = 0.0
    peak_memory: dict[str, float] = {}
    figures: dict[str, Any] = {}
    versions: dict[str, str | None] = {}
    computed_on: dict[str, str] = {}


class _Registered(_Part):
    changed_after_answers: bool


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a seal whose name lost a bit would pass for none

    profile: StrictStr
    overrides: dict[str, Any] = {}
    stages: dict[Annotated[str, AfterValidator(_stage)], _Record] = {}
    registered: _Registered | None = None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the run directory `path`; empty where there is none yet.

    Raises RunDirError where the file is there and cannot be read.
    """
    file = path / "manifest.json"
    try:
        if not file.exists():
            return {}
        manifest = open_seal(parse_json(file.read_text(encoding="utf-8")))
        json.dumps(manifest, allow_nan=False)  # what could not be written again is none of ours
        _Manifest.model_validate(manifest)
        return manifest
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg'].removeprefix('Value error, ')}"
    except (ValueError, OSError) as error:
        reason = str(error)
    raise RunDirError(
        f"{file} cannot be read ({reason}); restore it, take a new --run-dir, or delete it to run every stage again: "
        "nothing was changed."
    )


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


def require_recorded(path: Path, names: tuple[str, ...]) -> None:
    """Raise RunDirError for the first file among `names` (or below a folder there) that is not what its stage put on record.

    What no stage has on record is not judged.
    """
    for stage, record in read_manifest(path).get("stages", {}).items():
        for name, entry in record.get("outputs", {}).items():
            if not any(name == wanted or name.startswith(f"{wanted}/") for wanted in names):
                continue
            file = path / name
            if not file.is_file() or sha256(file) != entry["sha256"]:
                word = f"differs from what {stage} wrote" if file.is_file() else f"is missing, and {stage} wrote it"
                raise RunDirError(
                    f"{name} {word}; {command()} run --run-dir {path} makes it again, or bring the file back."
                )


def stale_on_record(manifest: Mapping[str, Any], last: Stage) -> str | None:
    """Why what `last` has on record is not the run's last word, by the manifest alone; None where it is.

    A collected run lies where neither its base model nor its checkpoints are, so that `RunDir.stale_because`, which
    looks at files, would call it stale: states, settings that were given, and recorded digests are compared instead.
    """
    records, written = manifest.get("stages", {}), {}
    for stage in (*ancestors(last), last):
        record = records.get(stage.name, {})
        if record.get("state") != "done":
            word = {"running": "was interrupted", "failed": "failed"}.get(record.get("state"), "has not run")
            return f"{stage.name} {word}"
        for key, value in manifest.get("overrides", {}).items():
            if _recorded_setting(record.get("settings", {}), key, value) != value:
                return f"{stage.name} is out of date: {key} was changed since"
        for name, entry in record.get("inputs", {}).items():
            if written.get(name, entry["sha256"]) != entry["sha256"]:
                return f"{stage.name} is out of date: {name} was written anew since"
        written |= {name: entry["sha256"] for name, entry in record.get("outputs", {}).items()}
    return None


def _recorded_setting(settings: Mapping[str, Any], key: str, default: Any) -> Any:
    """What a stage's record has under the dotted `key`; `default` where the stage does not rest on it."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):  # a record names whole sections, or section.key
        if (head := ".".join(parts[:end])) in settings:
            found = settings[head]
            for part in parts[end:]:
                found = found.get(part, default) if isinstance(found, Mapping) else default
            return found
    return default


def notebook_digest(stage: Stage) -> str:
    """sha256 over the notebook's cell sources, blind to outputs and ids; empty where it is not beside us."""
    if not stage.notebook.exists():
        return ""
    cells = json.loads(stage.notebook.read_text(encoding="utf-8"))["cells"]
    return hashlib.sha256("\0".join("".join(cell["source"]) for cell in cells).encode()).hexdigest()
