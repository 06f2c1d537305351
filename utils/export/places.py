"""Where exports lie: in the run directory, or in scratch where the session's output has no room for them."""

import hashlib
import json
import tempfile
from pathlib import Path

from utils.errors import RunDirError, ServiceError
from utils.files import is_folder, list_files
from utils.hardware import where
from utils.pipeline.run_dir import RunDir, require_recorded
from utils.pipeline.stages import BY_NAME
from utils.project import NAME

KINDS = ("adapter", "merged", "gguf")


def scratch_folder(run: RunDir, kind: str) -> Path:
    """Where goes what is not kept: gone with a session of Kaggle's or Colab's, and elsewhere with the next stage."""
    if where() == "local":
        return run.file(f"export/.scratch.tmp/{kind}")
    this_run = f"{run.path.name}-{hashlib.sha256(str(run.path).encode()).hexdigest()[:8]}"
    return Path(tempfile.gettempdir()) / NAME / this_run / kind


def export_folders(run: RunDir) -> dict[str, Path]:
    """{adapter, merged, gguf: folder} of the exports that are there, in the run directory or where 05 had to put them."""
    record, places = run.file("export/verify.json"), {}
    try:
        if record.exists():  # not before the first export
            places = dict(json.loads(record.read_text(encoding="utf-8"))["folders"])
        found = {kind: run.path / places.get(kind, f"export/{kind}") for kind in KINDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{record} cannot be read ({type(error).__name__}); run 05 again.") from None
    return {kind: folder for kind, folder in found.items() if is_folder(folder)}


def recorded_files(run: RunDir, kind: str) -> dict[str, Path]:
    """{name: file} of an export as 05 left it, in the run directory or in this session's scratch; else empty.

    Raises RunDirError for a file that changed since, ServiceError for one that lies outside its folder.
    """
    prefix, folder = f"export/{kind}/", run.file(f"export/{kind}")
    outputs = run.record(BY_NAME["05_export"]).get("outputs", {})
    files = {name.removeprefix(prefix): run.path / name for name in outputs if name.startswith(prefix)}
    if files and is_folder(folder):
        require_recorded(run.path, (f"export/{kind}",))
    else:
        folder, files = scratch_folder(run, kind), {}
        if export_folders(run).get(kind) == folder:
            files = {path.relative_to(folder).as_posix(): path for path in list_files(folder, "")}
    for path in files.values():  # a record may come from elsewhere, and its link lead to a private file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ServiceError(f"{run.path} names {path}, which lies outside the export; fetch the run again.")
    return files
