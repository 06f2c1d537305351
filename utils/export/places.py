"""Where exports lie, in the run directory or in scratch that ends with the session, and which files are theirs."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from utils.errors import RunDirError, ServiceError
from utils.files import is_folder, record_files, relative_name, sha256
from utils.pipeline.run_dir import RunDir, require_recorded
from utils.pipeline.stages import BY_NAME
from utils.project import NAME, command

KINDS = ("adapter", "merged", "gguf")


class _File(BaseModel):
    sha256: str


class _Places(BaseModel):
    folders: dict[str, str] = {}
    scratch: dict[str, dict[str, _File]] = {}


def scratch_folder(run: RunDir, kind: str) -> Path:
    """Where an export goes that the session's output has no room for; it is gone with the session."""
    return Path(tempfile.gettempdir()) / NAME / run.path.name / kind


def record_folders(run: RunDir, folders: Mapping[str, Path]) -> dict[str, dict]:
    """What verify.json says of the exports' folders, and of every file in scratch, which the manifest has none of."""
    inside = {kind: folder.is_relative_to(run.path) for kind, folder in folders.items()}
    return {
        "folders": {kind: str(f.relative_to(run.path) if inside[kind] else f) for kind, f in folders.items()},
        "scratch": {kind: record_files(f, ("",)) for kind, f in folders.items() if not inside[kind]},
    }


def export_folders(run: RunDir) -> dict[str, Path]:
    """{adapter, merged, gguf: folder} of the exports that are there, in the run directory or where 05 had to put them."""
    recorded = _read_record(run).folders
    found = {kind: run.path / recorded.get(kind, f"export/{kind}") for kind in KINDS}
    return {kind: folder for kind, folder in found.items() if is_folder(folder)}


def recorded_files(run: RunDir, kind: str) -> dict[str, Path]:
    """{name: file} of an export as 05 left it, in the run directory or in scratch; empty where it is in neither.

    Raises RunDirError for a file that changed since, ServiceError for one that lies outside its folder.
    """
    prefix, folder = f"export/{kind}/", run.file(f"export/{kind}")
    outputs = run.record(BY_NAME["05_export"]).get("outputs", {})
    names = [name.removeprefix(prefix) for name in outputs if name.startswith(prefix)]
    if names and is_folder(folder):
        require_recorded(run.path, (f"export/{kind}",))
    else:
        folder = scratch_folder(run, kind)
        names = _check_scratch(run, folder, _read_record(run).scratch.get(kind, {})) if is_folder(folder) else []
    files = {name: folder / name for name in names}
    for path in files.values():  # a record may come from elsewhere, and its link lead to a private file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ServiceError(f"{run.path} names {path}, which lies outside the export; fetch the run again.")
    return files


def _check_scratch(run: RunDir, folder: Path, recorded: Mapping[str, _File]) -> list[str]:
    for name, file in recorded.items():
        path = folder / name
        if relative_name(name) is None or not path.is_file() or sha256(path) != file.sha256:
            again = command("run", "--run-dir", run.path, "--from", "05")
            raise RunDirError(f"{path} is not what 05_export wrote; {again} makes it again.")
    return list(recorded)


def _read_record(run: RunDir) -> _Places:
    """`record_folders` as verify.json has it; empty before the first export. Raises RunDirError where it is damaged."""
    record = run.file("export/verify.json")
    try:
        return _Places.model_validate_json(record.read_bytes()) if record.exists() else _Places()
    except (OSError, ValueError) as error:
        raise RunDirError(f"{record} cannot be read ({type(error).__name__}); run 05 again.") from None
