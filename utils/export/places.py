"""What is exported, and where it lies: in the run directory, or in scratch where the session's output has no room."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import RunDirError
from utils.files import digest_of, is_folder, read_json
from utils.hardware import where
from utils.pipeline.run_dir import RunDir
from utils.project import NAME


@dataclass
class Plan:
    """What is made: `places` is {gguf, merged: folder}, `kinds` are GGUF's, by `llama_cpp`; `left_out` is {what: why not}."""

    kinds: list[str]
    llama_cpp: Path | None = None
    places: dict[str, Path] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([*self.lines, *(f"{what} is not made: {why}" for what, why in self.left_out.items())])


def scratch_folder(run: RunDir, kind: str) -> Path:
    """Where goes what is not kept: gone with a session of Kaggle's or Colab's, and elsewhere with the next stage."""
    if where() == "local":
        return run.file(f"export/.scratch.tmp/{kind}")
    this_run = f"{run.path.name}-{digest_of(str(run.path), 8)}"
    return Path(tempfile.gettempdir()) / NAME / this_run / kind


def export_folders(run: RunDir) -> dict[str, Path]:
    """{adapter, merged, gguf: folder} of the exports that are there, in the run directory or where 05 had to put them."""
    record, places = run.file("export/verify.json"), {}
    try:
        if record.exists():  # not before the first export
            places = dict(read_json(record)["folders"])
        found = {kind: run.path / places.get(kind, f"export/{kind}") for kind in ("adapter", "merged", "gguf")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{record} cannot be read ({type(error).__name__}); run 05 again.") from None
    return {kind: folder for kind, folder in found.items() if is_folder(folder)}
