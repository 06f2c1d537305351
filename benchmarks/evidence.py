"""What every benchmark's JSON file of evidence holds, and how several commands fill one."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils.files import write_json
from utils.hardware import gpus, installed

_PACKAGES = ("torch", "unsloth", "unsloth_zoo", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate",
             "xformers", "papermill")  # fmt: skip


def where() -> dict[str, Any]:
    """When and on what it was measured: date, GPUs, processors, and versions (None for what is not installed)."""
    versions = {package: installed(package) for package in _PACKAGES}
    machine = {"gpu": [gpu.name for gpu in gpus()], "processors": os.cpu_count(), "versions": versions}
    return {"date": datetime.now(UTC).date().isoformat(), **machine}


def refuse_other_machine(path: Path, found: dict[str, Any], instead: str) -> None:
    """SystemExit with a sentence that ends in `instead`, where the evidence `found` at `path` is of another machine or versions."""
    here = {key: value for key, value in where().items() if key != "date"}
    if differing := [key for key, value in here.items() if found.get(key) != value]:
        raise SystemExit(f"The {' and '.join(differing)} of {path} are not this machine's; {instead}.")


def add_to_file(path: Path, parts: dict[str, Any]) -> None:
    """Put `parts` into the evidence at `path`; what else it holds stays."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, before | parts)
