"""How long profile t4 takes from `python -m utils run` to the verdict and the exports, by part, on the 8B-shaped stand-in.

    python -m benchmarks.train measure /tmp/standin-8b --rows rows.jsonl --out train.json
    python -m benchmarks.wall /tmp/standin-8b --rows rows.jsonl --benchmark questions.jsonl --train train.json --out wall.json

A small job of a fixed size, long enough for trials. Parts come from what every run leaves: when papermill began and ended
each cell, when files were written, and training/summary.json. What trials alone take, and tokens per second, are those of
the configuration `ours` in `--train`, measured on this machine; without it they are measured here, after the run.
"""

from __future__ import annotations

import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import nbformat
import pandas as pd
import typer

from benchmarks.evidence import refuse_other_machine, where
from benchmarks.peers import DRY
from benchmarks.series import run_series, small_settings, summarise
from benchmarks.train import run_part
from utils.config import load_config
from utils.files import write_json
from utils.hardware import gpus
from utils.pipeline.run_dir import read_manifest
from utils.pipeline.stages import STAGES

_STEPS = 32  # more than the updates from which on step plans are tried
_BEGINNING = ('"utils.project"', "open_stage(")  # bootstrap and opening: the cells of every notebook
_QUESTIONS = {"01_baseline_inference": "baseline", "04_comparison": "tuned"}


class Cells:
    """One executed notebook: `began` and `ended` (seconds since 1970), and those of each code cell, by what it calls."""

    def __init__(self, path: Path):
        notebook = nbformat.read(path, as_version=4)
        self.began, self.ended = _span(notebook)
        self._spans = [(cell.source, *_span(cell)) for cell in notebook.cells if cell.cell_type == "code"]

    def calling(self, call: str) -> tuple[float, float]:
        """(began, ended) of the first cell that holds `call`; raises StopIteration where none does."""
        return next((began, ended) for source, began, ended in self._spans if call in source)

    def seconds(self, *calls: str) -> float:
        """What the cells that hold any of `calls` took together."""
        return sum(ended - began for source, began, ended in self._spans if any(call in source for call in calls))

    def work(self) -> float:
        """Seconds of all cells but those that begin every notebook."""
        return self.seconds("") - self.seconds(*_BEGINNING)


def _span(node) -> tuple[float, float]:
    times = (datetime.fromisoformat(node.metadata["papermill"][key]) for key in ("start_time", "end_time"))
    began, ended = (time if time.tzinfo else time.replace(tzinfo=UTC) for time in times)
    return began.timestamp(), ended.timestamp()


def parts_of(run_dir: Path, seconds: float, trials: float) -> dict[str, float]:
    """Seconds of a finished run by part; they add up to `seconds`, the whole.

    Loads hold the imports before them, and in 04 the check of batches against single prompts; exports hold their own loads.

    `trials` is what a step plan's trials take, counted where this run made any.
    """
    stages = {stage.name: Cells(run_dir / "report" / "notebooks" / f"{stage.name}.ipynb") for stage in STAGES}
    parts = {"notebooks begun and left": sum(cells.ended - cells.began - cells.work() for cells in stages.values())}
    parts["rows and questions"] = stages["00_setup"].work() + stages["02_dataset_formatting"].work()
    parts["loads"] = sum(cells.seconds("load_for_inference(") for cells in stages.values())
    training = _training(run_dir, stages["03_lora_training"], trials)
    parts["loads"] += training.pop("loads")
    parts |= training | {"answers": 0.0, "forced letters": 0.0, "losses": 0.0}
    for name, folder in _QUESTIONS.items():
        before, _ = stages[name].calling("evaluate_model(")
        for part, file in (("answers", "answers.jsonl"), ("forced letters", "forced.jsonl"), ("losses", "nll.parquet")):
            written = (run_dir / folder / file).stat().st_mtime
            parts[part] += written - before
            before = written
    parts["exports"] = stages["05_export"].work()
    return {name: round(part, 1) for name, part in (parts | {"all else": seconds - sum(parts.values())}).items()}


def _training(run_dir: Path, cells: Cells, trials: float) -> dict[str, float]:
    """03's seconds by part: loads, trials, to the first update's end, the updates after it."""
    plan = run_dir / "training" / "step_plan.json"
    trials = trials if json.loads(plan.read_text(encoding="utf-8"))["trials"] else 0.0
    chosen = plan.stat().st_mtime
    updates = json.loads((run_dir / "training" / "summary.json").read_text(encoding="utf-8"))["update_seconds"]
    began, _ = cells.calling("train_adapter(")
    first = first_update(run_dir) - chosen
    return {"loads": chosen - began - trials, "trials": trials, "first update": first, "updates": sum(updates)}


def first_update(run_dir: Path) -> float:
    """When the first update of 03 ended, in seconds since 1970."""
    record = read_manifest(run_dir)["stages"]["03_lora_training"]
    return datetime.fromisoformat(record["started"]).timestamp() + record["figures"]["seconds_to_first_update"]


def trials_share(ours: dict, rows: int, tokens: float) -> float:
    """Seconds of the trials over those of training `rows` rows of so many `tokens` (mean), at the speed of `ours`."""
    return round(ours["seconds"]["trials"] / (rows * tokens / ours["tokens_per_second"]), 4)


def measured_ours(train: Path) -> dict:
    """The configuration `ours` of benchmarks.train in its file; SystemExit where that is of another machine."""
    found = json.loads(train.read_text(encoding="utf-8"))
    refuse_other_machine(train, found, "measure it here, or leave --train out")
    return found["configurations"]["ours"]


def measure_ours(standin: Path, rows: Path) -> dict:
    """The same, measured now; SystemExit where it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "case.json"
        if wrong := run_part(["case", "ours", str(standin), str(rows), str(out), str(Path(scratch) / "run")]):
            raise SystemExit(f"The configuration `ours` could not be measured: {wrong}")
        return json.loads(out.read_text(encoding="utf-8"))


def main(
    standin: Path,
    rows: Annotated[Path, typer.Option(help="Training rows, JSONL.")],
    benchmark: Annotated[Path, typer.Option(help="Multiple-choice items, JSONL.")],
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    train: Annotated[Path | None, typer.Option(help="The evidence of `benchmarks.train measure` here.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="More settings of the run.")] = None,
) -> None:
    """Run the series and write to OUT what each part took; exit 1 where it failed."""
    more = dict(item.split("=", 1) for item in set_ or [])
    settings = small_settings(standin, rows, benchmark) | {"train.max_steps": _STEPS, "train.save_steps": 50}
    settings |= ({} if gpus() else DRY) | more
    ours = measured_ours(train) if train else None  # before the run, which a wrong file would cost
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        began = time.time()
        if status := run_series(run_dir, settings):
            raise typer.Exit(status)
        seconds, ours = time.time() - began, ours or measure_ours(standin, rows)
        tokens = pd.read_parquet(run_dir / "data" / "formatted" / "train.parquet")["tokens"].mean()
        notebooks = run_dir / "report" / "notebooks"
        _, verdict = Cells(notebooks / "04_comparison.ipynb").calling("compare_models(")
        evidence = {
            "what": "profile t4 on an 8B-shaped stand-in (random weights), T4 arithmetic and memory emulated",
            **where(),
            "settings": {key: str(Path(str(value)).name) for key, value in settings.items()},
            "first_update_seconds": round(first_update(run_dir) - Cells(notebooks / "03_lora_training.ipynb").began, 1),
            "trials_share": trials_share(ours, load_config("t4").data.train_rows, tokens),
            "verdict_seconds": round(verdict - began, 1),
            "seconds": round(seconds, 1),
            "parts": parts_of(run_dir, seconds, ours["seconds"]["trials"]),
            "ours": {key: ours[key] for key in ("tokens_per_second", "fit", "seconds", "trials")},
            "stages": {name: stage["seconds"] for name, stage in summarise(run_dir)["stages"].items()},
        }
    write_json(out, evidence)
    print(
        json.dumps({key: evidence[key] for key in ("first_update_seconds", "trials_share", "verdict_seconds", "parts")})
    )


if __name__ == "__main__":
    typer.run(main)
