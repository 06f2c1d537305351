"""What every benchmark's JSON file of evidence holds, and how several commands fill one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils.files import write_json
from utils.hardware import gpus, installed

_PACKAGES = ("torch", "unsloth", "unsloth_zoo", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate",
             "xformers", "papermill")  # fmt: skip


def where() -> dict[str, Any]:
    """When and on what it was measured: date, GPUs, and versions (None for what is not installed)."""
    versions = {package: installed(package) for package in _PACKAGES}
    return {"date": datetime.now(UTC).date().isoformat(), "gpu": [gpu.name for gpu in gpus()], "versions": versions}


def add_to_file(path: Path, parts: dict[str, Any]) -> None:
    """Put `parts` into the evidence at `path`; what else it holds stays."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, before | parts)
