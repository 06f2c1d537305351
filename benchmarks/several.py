"""What may not depend on an accident or on the number of GPUs: a training that was killed, and the answers of one or two.

    python -m benchmarks.several --out benchmarks/results/several.json

The demo's model and rows in a T4's arithmetic, on one GPU and, where there are two, on both. For each: notebook 03 without
disturbance; then again, every process of it killed with SIGKILL up to two seconds after its first checkpoint, and `run`
once more. Both logs' losses and both adapters are compared. Then notebook 01's answers by one process and by two. Without a
GPU it is a dry run with two processes on the CPU. About eight minutes with two GPUs; --processes 2 --no-compare-answers
takes four.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import psutil
import typer

from benchmarks.evidence import where
from utils.files import write_json
from utils.hardware import gpus

SEED, UPDATES = 1, 120


def settings(processes: int) -> dict:
    """What every run sets: packed training as profile t4 has it, a T4's arithmetic where there is a GPU."""
    values = {"train.packing": True, "train.step_plan": "auto", "model.max_seq_length": 480, "train.max_steps": UPDATES,
              "train.save_steps": 20, "train.gradient_checkpointing": True, "train.per_device_train_batch_size": 2,
              "train.gradient_accumulation_steps": 2, "hardware.processes": processes, "hardware.pins": "report"}  # fmt: skip
    if gpus():
        values |= {"hardware.device": "cuda", "hardware.dtype": "float16", "hardware.emulate_t4": True,
                   "hardware.backend": "unsloth", "train.optim": "adamw_8bit"}  # fmt: skip
    else:
        values |= {"train.packing": False, "train.max_steps": 24, "train.save_steps": 4}
    return values


def command(run_dir: Path, processes: int, stage: str) -> list[str]:
    """`python -m utils run` of one stage."""
    stages = ["--from", stage, "--to", stage]
    chosen = [f"--set={key}={json.dumps(value).strip(chr(34))}" for key, value in settings(processes).items()]
    return [sys.executable, "-m", "utils", "run", "--profile", "demo", "--run-dir", str(run_dir), *stages, *chosen]


def run(run_dir: Path, processes: int, stage: str) -> float:
    """Run one stage; seconds that it took. Ends this program where the stage failed."""
    started = time.monotonic()
    done = subprocess.run(command(run_dir, processes, stage), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{stage} of {run_dir} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return round(time.monotonic() - started, 1)


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """The files that are written last into each checkpoint."""
    return list(run_dir.glob("training/checkpoints/*/checkpoint-*/trainer_state.json"))


def kill_on_the_way(run_dir: Path, processes: int, wait: float) -> int:
    """Start notebook 03, kill every process of it `wait` seconds after its first checkpoint; the last checkpoint's step."""
    started = subprocess.Popen(command(run_dir, processes, "03"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while started.poll() is None and not whole_checkpoints(run_dir):
        time.sleep(0.01)
    time.sleep(wait)
    if started.poll() is not None:
        raise SystemExit(f"the training in {run_dir} ended before it could be killed")
    top = psutil.Process(started.pid)
    for process in [top, *top.children(recursive=True)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    started.wait()
    time.sleep(1)  # for the driver of a GPU to let go of its memory
    return max(int(path.parent.name.split("-")[1]) for path in whole_checkpoints(run_dir))


def resumed(base: Path, place: Path, processes: int, rng: random.Random) -> dict:
    """One training left alone and one killed and continued, from the same rows: what they ended with."""
    from safetensors.torch import load_file

    whole, torn = place / f"whole-{processes}", place / f"torn-{processes}"
    for folder in (whole, torn):
        shutil.copytree(base, folder)
    figures: dict = {"seconds_undisturbed": run(whole, processes, "03")}
    (torn / "training").mkdir(exist_ok=True)  # the same way to compute an update; trials by the clock may end otherwise
    shutil.copy(whole / "training/step_plan.json", torn / "training/step_plan.json")
    figures["killed_after_checkpoint"] = kill_on_the_way(torn, processes, rng.uniform(0, 2))
    figures["seconds_after_the_kill"] = run(torn, processes, "03")
    killed = figures["killed_after_checkpoint"]
    logs = [pd.read_csv(folder / "training/log.csv").set_index("step")["loss"] for folder in (whole, torn)]
    adapters = [load_file(folder / "training/adapter/adapter_model.safetensors") for folder in (whole, torn)]
    fits = [
        json.loads((folder / "training/step_plan.json").read_text(encoding="utf-8"))["step_plan"]
        for folder in (whole, torn)
    ]
    return figures | {
        "updates": [len(log) for log in logs],
        "losses": [[round(float(loss), 6) for loss in log] for log in logs],
        "fits": fits,
        "last_losses": [float(log.iloc[-1]) for log in logs],
        "last_loss_difference": float(abs(logs[0].iloc[-1] - logs[1].iloc[-1])),
        "largest_loss_difference": float((logs[0] - logs[1]).abs().max()),
        # Up to here nothing was disturbed: more than 0 would mean that such runs differ without a kill too.
        "largest_loss_difference_up_to_the_checkpoint": float((logs[0] - logs[1]).loc[:killed].abs().max()),
        "largest_weight_difference": max(float((adapters[0][k] - adapters[1][k]).abs().max()) for k in adapters[0]),
    }


def answers(base: Path, place: Path) -> dict:
    """Notebook 01 by one process and by two: how many answers are the same text."""
    found, seconds, said = {}, {}, []
    for count in (1, 2):
        folder = place / f"answers-{count}"
        shutil.copytree(base, folder)
        seconds[count] = run(folder, count, "01")
        lines = (folder / "baseline/answers.jsonl").read_text(encoding="utf-8").splitlines()
        found[count] = {answer["id"]: answer["text"] for answer in map(json.loads, lines)}
        said += [path.read_text(errors="replace") for path in (folder / "workers").glob("*.log")]
    same = sum(found[1][name] == found[2].get(name) for name in found[1])
    lines = [line for text in said for line in text.splitlines() if "questions on device" in line]
    return {"questions": len(found[1]), "same": same, "seconds": seconds, "second_process": lines}


def main(
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    processes: Annotated[list[int] | None, typer.Option(help="Only so many; 1 and 2 otherwise.")] = None,
    compare_answers: Annotated[bool, typer.Option(help="Notebook 01 by one process and by two.")] = True,
) -> None:
    """Measure, and add to OUT after each part; what OUT holds already stays, each part with its date and versions."""
    evidence: dict = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"resumed": []}
    evidence["what"] = (
        "the demo's task: killed with SIGKILL and continued against undisturbed; answers by one process and two"
    )
    counts = processes or ([1, 2] if len(gpus()) != 1 else [1])
    with tempfile.TemporaryDirectory() as scratch:
        base, rng = Path(scratch) / "base", random.Random(SEED)
        for stage in ("00", "02"):
            run(base, 1, stage)
        for count in counts:
            evidence["resumed"].append({**where(), "processes": count, **resumed(base, Path(scratch), count, rng)})
            write_json(out, evidence)
            print(evidence["resumed"][-1], flush=True)
        if 2 in counts and compare_answers:
            evidence["answers"] = {**where(), **answers(base, Path(scratch))}
            write_json(out, evidence)
            print(evidence["answers"], flush=True)


if __name__ == "__main__":
    typer.run(main)
