"""The whole series on a CUDA GPU with the 8B-shaped stand-in: per-stage seconds, peak memory, versions, fused layers.

    python -m benchmarks.standin /tmp/standin-8b --vocabulary llama3_bpe.model
    python -m benchmarks.series /tmp/standin-8b --rows medical_o1_sample.jsonl --benchmark medqa_sample.jsonl \
        --out benchmarks/results/series-8b.json

series-16bit.json, series-4bit.json and series-4bit-two.json are of the same command with `--set export.merged=false`: on the
16-bit stand-in and the quantised one, the last with two GPUs.

It runs profile t4 with fewer steps and questions, a T4's limits emulated on a larger GPU, then ten training steps on
the plain backend. The weights are random, so the answers mean nothing; what is measured is that everything runs, how
long it takes, and how much memory it needs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from benchmarks.evidence import where
from utils.files import write_json
from utils.pipeline.run_dir import read_manifest
from utils.pipeline.stages import STAGES

_SMALL = {
    "data.eval_rows": 16,
    "data.train_rows": 80,
    "train.max_steps": 10,
    "train.save_steps": 5,
    "generate.max_new_tokens": 64,
    "evaluate.questions": 8,
    "evaluate.benchmark.rows": 8,
    "export.prompts": 4,
    "hardware.emulate_t4": "true",
    "hardware.pins": "report",  # a machine lent for a benchmark has its own tools; the stack's versions are recorded
}


def small_settings(standin: Path, rows: Path, benchmark: Path) -> dict[str, object]:
    """Profile t4's settings for a short run on a T4's limits, with the stand-in and these files."""
    files = {"model.name": standin, "data.path": rows, "evaluate.benchmark.path": benchmark}
    return _SMALL | {key: path.resolve() for key, path in files.items()}


def run_series(run_dir: Path, settings: dict[str, object], *, last: str = "05", only: tuple[str, ...] = ()) -> int:
    """`python -m utils run --profile t4` to `last`, or of the stages `only`, in a process each; the first exit status."""
    spans = [("--from", stage, "--to", stage) for stage in only] or [("--to", last)]
    for span in spans:
        command = [sys.executable, "-m", "utils", "run", "--profile", "t4", "--run-dir", str(run_dir), *span]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    return 0


def summarise(run_dir: Path) -> dict:
    """Per stage: state, seconds, peak memory and figures; and the training log's health."""
    stages = read_manifest(run_dir).get("stages", {})
    summary: dict = {"stages": {}}
    for stage in STAGES:
        record = stages.get(stage.name)
        if record:
            kept = ("state", "seconds", "peak_memory", "figures", "model_loads", "error")
            summary["stages"][stage.name] = {key: record[key] for key in kept if key in record}
    log = run_dir / "training" / "log.csv"
    frame = pd.read_csv(log) if log.exists() else pd.DataFrame()
    if len(frame):  # a null run's has no update
        values = pd.concat([frame["loss"], frame["grad_norm"]])
        summary["training"] = {
            "steps": int(frame["step"].max()),
            "losses": [round(float(loss), 4) for loss in frame["loss"]],
            "losses_not_finite": int((~frame["loss"].map(math.isfinite)).sum()),
            "gradients_not_finite": int((~frame["grad_norm"].map(math.isfinite)).sum()),
            "finite": bool(values.map(math.isfinite).all()),
        }
    peaks = [s.get("peak_memory", {}).get("gpu_reserved_gib", 0.0) for s in summary["stages"].values()]
    summary["peak_gpu_reserved_gib"] = max(peaks, default=0.0)
    return summary


def main(
    standin: Path,
    rows: Annotated[Path, typer.Option(help="Training rows, JSONL.")],
    benchmark: Annotated[Path, typer.Option(help="Multiple-choice items, JSONL.")],
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    only_plain: Annotated[bool, typer.Option(help="Only the plain backend; the rest of OUT stays.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="More settings for both runs.")] = None,
) -> None:
    """Run the series and the plain backend; write the evidence to OUT; exit 1 where either failed."""
    settings = small_settings(standin, rows, benchmark) | dict(item.split("=", 1) for item in set_ or [])
    with tempfile.TemporaryDirectory() as scratch:
        series, plain = Path(scratch) / "series", Path(scratch) / "plain"
        status = [json.loads(out.read_text())["exit_status"][0] if only_plain else run_series(series, settings)]
        evidence = json.loads(out.read_text(encoding="utf-8")) if only_plain else {
            "what": "profile t4 on an 8B-shaped stand-in (random weights), T4 arithmetic and memory emulated",
            **where(),
            "settings": {key: str(Path(str(value)).name) for key, value in settings.items()},
            "model_bytes": sum(file.stat().st_size for file in standin.iterdir()),
            "series": summarise(series),
        }  # fmt: skip
        if not only_plain:
            write_json(out, {"exit_status": status, **evidence})
        plain_settings = {**settings, "hardware.backend": "transformers"}
        status.append(run_series(plain, plain_settings, only=("00", "02", "03")))
        evidence["plain_backend"] = summarise(plain)
        write_json(out, {**evidence, "exit_status": status})
    raise typer.Exit(max(status))


if __name__ == "__main__":
    typer.run(main)
