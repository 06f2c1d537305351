"""What each notebook waits for before it works: seconds of its imports, and which heavy libraries come with them.

    python -m benchmarks.waiting RUN_DIR --out benchmarks/results/waiting.json

Every import statement of a notebook's cells is run in a fresh process, three times; the median counts. RUN_DIR is a finished run,
whose manifest adds the seconds of each stage, and of 03 those until its first update was done.
"""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import nbformat
import typer

from utils.files import write_json
from utils.hardware import installed
from utils.pipeline.run_dir import read_manifest
from utils.pipeline.stages import STAGES, Stage
from utils.project import ROOT

HEAVY = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "wandb",
    "unsloth",
    "scipy",
    "sklearn",
    "matplotlib",
    "pandas",
)
_MEASURE = """
import json, sys, time
started = time.monotonic()
exec({imports!r})
print(json.dumps([time.monotonic() - started, [name for name in {heavy!r} if name in sys.modules]]))
"""


def imports_of(stage: Stage) -> str:
    """The import statements of a notebook's cells and of the functions in them, the bootstrap cell left out."""
    lines = []
    for cell in nbformat.read(stage.notebook, as_version=4).cells[3:]:
        if cell.cell_type == "code":
            found = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Import | ast.ImportFrom)]
            lines += [ast.unparse(node) for node in found]
    return "\n".join(dict.fromkeys(lines))


def measure_imports(stage: Stage, times: int = 3) -> dict:
    """Median seconds of the notebook's imports in fresh processes, and the heavy libraries among what they load."""
    code = _MEASURE.format(imports=imports_of(stage), heavy=HEAVY)
    seconds, loaded = [], []
    for _ in range(times):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        taken, loaded = json.loads(done.stdout.strip().splitlines()[-1])
        seconds.append(round(taken, 2))
    return {"import_seconds": statistics.median(seconds), "windows": seconds, "heavy": loaded}


def main(
    run_dir: Path,
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
) -> None:
    """Measure every notebook and write OUT."""
    stages = read_manifest(run_dir).get("stages", {})
    evidence: dict = {
        "what": "seconds of each notebook's imports in a fresh process, and of its stage in one run of the demo on a CPU",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: installed(name) for name in ("torch", "transformers", "trl", "peft", "wandb")},
        "stages": {},
    }
    for stage in STAGES:
        record = stages.get(stage.name, {})
        figures = {"stage_seconds": record.get("seconds")}
        if "seconds_to_first_update" in record.get("figures", {}):
            figures["seconds_to_first_update"] = record["figures"]["seconds_to_first_update"]
        evidence["stages"][stage.name] = measure_imports(stage) | figures
        print(stage.name, evidence["stages"][stage.name])
    write_json(out, evidence)


if __name__ == "__main__":
    typer.run(main)
