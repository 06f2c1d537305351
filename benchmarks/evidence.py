"""One JSON file of evidence that several commands of a benchmark fill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.files import write_json


def add_to_file(path: Path, parts: dict[str, Any]) -> None:
    """Put `parts` into the evidence at `path`; what else it holds stays."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, before | parts)
