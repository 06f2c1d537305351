"""How fast training is, against what else a user would pick, on CUDA GPUs with a T4's limits emulated.

    python -m benchmarks.standin /tmp/standin-8b --vocabulary llama3_bpe.model
    python -m benchmarks.train measure /tmp/standin-8b --rows medical_o1_sample.jsonl --out train.json [--quick]
    python -m benchmarks.train measure ... --only ours --only "unsloth packing"     # in parts, on one machine
    python -m benchmarks.train two-gpus /tmp/standin-8b --rows medical_o1_sample.jsonl --out train.json     # adds to it
    python -m benchmarks.train growth /tmp/standin-8b --rows medical_o1_sample.jsonl --out train.json       # adds to it

Each configuration runs notebook 03's own functions in a fresh process: two updates to warm up, then windows of three, of
which the median counts; two more under torch's profiler give the sum of kernel times, which says more about a T4, where
arithmetic is the limit, than the wall time of a GPU that waits for its host. Tokens are those of the rows, padding not
counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.evidence import add_to_file, refuse_other_machine, where
from benchmarks.peers import CASES
from utils.files import write_json
from utils.hardware import gpus

app = typer.Typer()
QUICK = ("tutorial", "plain", "ours")
OURS = ("ours", "ours, one pack at a time")  # by trials on this GPU, and by the plan that a T4 would choose
PEERS = {
    "unsloth_packing": ("unsloth packing", "unsloth packing, largest batch"),
    "tutorial": ("tutorial",),
    "plain": ("plain",),
    "plain_packing": ("plain packing", "plain packing, 1 x 4"),
}


def run_part(arguments: list[str]) -> str | None:
    """`python -m benchmarks.train_cases ...` in a fresh process; the last line of what went wrong, or None."""
    command = [sys.executable, "-m", "benchmarks.train_cases", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1][:300]


def ratios(evidence: dict) -> dict:
    """The headline figures, by wall time and `_kernel` time; what was not measured is left out.

    `ratio_vs_...` is the faster of ours over the faster of a peer's configurations by that clock, `peak_share` ours' share of
    the matrix peak, recomputed work counted, `reserved_gib` the most that any configuration took.
    """
    cases, found = evidence["configurations"], {}
    clocks = {
        "": {name: case["tokens_per_second"] for name, case in cases.items()},
        "_kernel": {name: case["kernels"]["tokens_per_second"] for name, case in cases.items() if case.get("kernels")},
    }
    if "ours" in cases:
        found["reserved_gib"] = max(case["reserved_gib"] or 0 for case in cases.values())
    for clock, speed in clocks.items():
        if "ours" not in speed:
            continue
        ours = max((name for name in OURS if name in speed), key=speed.get)
        for key, names in PEERS.items():
            if measured := [speed[name] for name in names if name in speed]:
                found[f"ratio_vs_{key}{clock}"] = round(speed[ours] / max(measured), 2)
        if "peak" in evidence:
            reached = speed[ours] * cases[ours]["flops_per_token"] / 1e12
            found[f"peak_share{clock}"] = round(reached / evidence["peak"]["tflops"], 3)
    return found


@app.command()
def measure(
    standin: Path,
    rows: Annotated[Path, typer.Option(help="Training rows, JSONL; repeated to 500.")],
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    quick: Annotated[bool, typer.Option(help="Only ours, the tutorial's recipe and plain TRL.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only these configurations; the others stay in OUT, which must be of this machine."),
    ] = None,
) -> None:
    """Measure every configuration, each in a fresh process, and write OUT after each."""
    names, began = only or (QUICK if quick else tuple(CASES)), time.monotonic()
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    kept = ["two_gpus", "ratio_two_gpus", "growth"]
    if only and before:
        refuse_other_machine(out, before, "name another --out")
        kept += ["peak", "boundary", "boundary_plain", "configurations", "failed", "skipped"]
    evidence: dict = {
        "what": "training, non-padding tokens per second: 8B shapes, 4-bit, fp16, T4 attention, at most 14.0 GiB",
        **where(),
        "configurations": {},
        "failed": {},
        "skipped": {},
        **{key: before[key] for key in kept if key in before},
    }
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if gpus():
            parts = {"peak": ["peak"]}
            if not quick:
                parts["boundary"] = ["boundary", "ours", str(standin), str(rows)]
                parts["boundary_plain"] = ["boundary", "plain packing", str(standin), str(rows)]
            for name in [name for name in parts if name not in evidence]:
                evidence["failed"].pop(name, None)
                wrong = run_part([*parts[name], str(place / f"{name}.json")])
                if wrong:
                    evidence["failed"][name] = wrong
                else:
                    evidence[name] = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
        for name in names:
            started = time.monotonic()
            arguments = ["case", name, str(standin), str(rows), str(place / "case.json"), str(place / name)]
            wrong = run_part(arguments)
            for told in ("configurations", "failed", "skipped"):
                evidence[told].pop(name, None)
            if wrong:
                evidence["skipped" if wrong.startswith("skipped: ") else "failed"][name] = wrong
            else:
                result = json.loads((place / "case.json").read_text(encoding="utf-8"))
                evidence["configurations"][name] = {**result, "whole_seconds": round(time.monotonic() - started, 1)}
            evidence |= ratios(evidence) | {"seconds": round(time.monotonic() - began, 1)}
            write_json(out, evidence)
            print(name, wrong or f"{evidence['configurations'][name]['tokens_per_second']:,.0f} tokens/s", flush=True)
    print(json.dumps(ratios(evidence)))
    raise typer.Exit(1 if evidence["failed"] else 0)


@app.command()
def growth(
    standin: Path,
    rows: Annotated[Path, typer.Option(help="Training rows, JSONL; repeated to 500, 2,000 and 8,000.")],
    out: Annotated[Path, typer.Option(help="The evidence of `measure`, to which this is added.")],
) -> None:
    """What more rows cost: seconds to pack them, then speed and memory (GiB) of updates; exit 1 where that failed."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "growth.json"
        if wrong := run_part(["growth", str(standin), str(rows), str(place)]):
            raise SystemExit(f"growth failed: {wrong}")
        found = json.loads(place.read_text(encoding="utf-8"))
    add_to_file(out, {"growth": {**where(), "by_rows": found}})
    print(json.dumps(found))


@app.command()
def two_gpus(
    standin: Path,
    rows: Annotated[Path, typer.Option(help="Training rows, JSONL.")],
    out: Annotated[Path, typer.Option(help="The evidence of `measure`, to which this is added.")],
    steps: Annotated[int, typer.Option(help="Updates of each run.")] = 24,
) -> None:
    """Notebook 03 itself, profile t4, on one GPU and then on two of the same machine; exit 1 where a run failed."""
    from benchmarks.series import run_series, summarise

    settings = {"model.name": standin.resolve(), "data.path": rows.resolve(), "data.eval_rows": 16, "data.train_rows": 80,
                "train.num_train_epochs": 100, "train.max_steps": steps, "evaluate.benchmark.name": "null",
                "evaluate.primary": "nll", "hardware.emulate_t4": "true", "hardware.pins": "report"}  # fmt: skip
    found: dict = {**where(), "failed": []}
    with tempfile.TemporaryDirectory() as scratch:
        for count in (1, 2):
            run_dir = Path(scratch) / str(count)
            status = run_series(run_dir, {**settings, "hardware.processes": count}, only=("00", "02", "03"))
            summary = run_dir / "training" / "summary.json"
            if status or not summary.exists():
                found["failed"].append(summarise(run_dir))
                break
            told = json.loads(summary.read_text(encoding="utf-8"))
            found[f"{count} GPU"] = {
                **told,
                "seconds_per_update": round(statistics.median(told["update_seconds"][2:]), 4),
                "losses": summarise(run_dir)["training"]["losses"],
            }
            add_to_file(out, {"two_gpus": found})
    if not found["failed"]:  # the same packs in every update
        one, two = (found[f"{count} GPU"]["seconds_per_update"] for count in (1, 2))
        found["ratio"] = round(one / two, 3)
    add_to_file(out, {"two_gpus": found, "ratio_two_gpus": found.get("ratio")})
    print(json.dumps({key: found.get(key) for key in ("ratio", "failed")}))
    raise typer.Exit(bool(found["failed"]))


if __name__ == "__main__":
    app()
