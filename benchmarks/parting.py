"""Where two trainings of two processes part, though nothing disturbs either: gradients to the bit, matrix by matrix.

    python -m benchmarks.parting measure --out parting.json

The demo's task as in `benchmarks.several`, a few updates, several times from the same rows and weights. Each process notes
digests of its own gradients before they are added up, and of what the optimizer gets. Backward passes run from the last
layer to the first, so the first matrix that differs, in that order, is where it enters. What the environment sets
(TORCH_COMPILE_DISABLE=1, CUBLAS_WORKSPACE_CONFIG=:4096:8) holds for all runs. Without a GPU it is a dry run on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from transformers import TrainerCallback

from benchmarks import several
from benchmarks.evidence import where
from benchmarks.recipe import notebook_source
from utils.files import digest_of, write_json, write_text

PROCESSES, UPDATES = 2, 4
_DECISIVE = ("TORCH_COMPILE_DISABLE", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")

app = typer.Typer()


class Digests(TrainerCallback):
    """Notes, for every update, {"own", "summed"}: a digest of each matrix's gradient, the last layer's first."""

    def __init__(self, trainer, path: Path):
        self.trainer, self.path, self.updates = trainer, path, []

    def on_train_begin(self, args, state, control, **_):
        wrapped = self.trainer.model_wrapped
        self.names = {id(weight): name for name, weight in wrapped.module.named_parameters() if weight.requires_grad}
        wrapped.register_comm_hook(None, self.add_up)

    def on_step_begin(self, args, state, control, **_):
        self.updates.append({"own": {}, "summed": {}})

    def add_up(self, _, bucket):
        """What DistributedDataParallel does with a bucket of gradients, once they are noted."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        for weight, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self.updates[-1]["own"][self.names[id(weight)]] = digest(gradient)
        return allreduce_hook(None, bucket)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        last_first = reversed(
            [(name, weight.grad) for name, weight in model.named_parameters() if weight.requires_grad]
        )
        update, own = self.updates[-1], self.updates[-1]["own"]
        update["summed"] = {name: digest(gradient) for name, gradient in last_first}
        update["own"] = {name: own[name] for name in update["summed"]}

    def on_train_end(self, args, state, control, **_):
        write_json(self.path, self.updates)


def digest(tensor) -> str:
    """Of a tensor's bits."""
    return digest_of(tensor.detach().float().cpu().numpy().tobytes().hex(), length=12)


@app.command()
def worker(run_dir: Path, folder: Path) -> None:
    """One of the processes that `accelerate launch` starts: trains, and leaves FOLDER/RANK.json."""
    from utils.hardware import global_rank
    from utils.training import launch

    as_written = launch.read_recipe

    def read_recipe(run):
        load_with_lora, make_trainer = as_written(run)

        def noting(*given, **more):
            trainer = make_trainer(*given, **more)
            trainer.add_callback(Digests(trainer, folder / f"{global_rank()}.json"))
            return trainer

        return load_with_lora, noting

    launch.read_recipe = read_recipe
    launch.run_worker(str(run_dir))


def train(run_dir: Path, folder: Path) -> list[list[dict]]:
    """What each process noted of the updates of a training in `run_dir`; SystemExit where it failed."""
    settings = several.settings(PROCESSES) | {"train.max_steps": UPDATES, "train.step_plan": "given"}
    opening = (
        f"from utils.pipeline import open_stage; open_stage('03_lora_training', 'demo', {str(run_dir)!r}, {settings!r})"
    )
    write_text(run_dir / "training/recipe.py", notebook_source())
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", PROCESSES,
              "--num_machines", 1, "--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no",
              "-m", "benchmarks.parting", "worker", run_dir, folder]  # fmt: skip
    for command in (["-c", opening], launch):
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]


def compare(one: list[list[dict]], other: list[list[dict]]) -> list[dict]:
    """For each update and process: how many matrices' gradients differ between two trainings, and the first that does."""
    found = []
    for update in range(len(one[0])):
        for rank, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            entry: dict = {"update": update, "process": rank}
            for kind, digests in mine[update].items():
                differ = [name for name, value in digests.items() if theirs[update][kind].get(name) != value]
                entry[kind] = {"of": len(digests), "differ": len(differ), "first": differ[0] if differ else None}
            found.append(entry)
    return found


@app.command()
def measure(
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    runs: Annotated[int, typer.Option(help="Trainings, each compared with the first.")] = 3,
) -> None:
    """Train several times, and add to OUT where each training parts from the first."""
    evidence = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"trials": []}
    with tempfile.TemporaryDirectory() as scratch:
        base, noted = Path(scratch) / "base", []
        for stage in ("00", "02"):
            several.run(base, 1, stage)
        for number in range(runs):
            run_dir, folder = Path(scratch) / f"run-{number}", Path(scratch) / f"digests-{number}"
            shutil.copytree(base, run_dir)
            folder.mkdir()
            noted.append(train(run_dir, folder))
    environment = {name: os.environ[name] for name in _DECISIVE if name in os.environ}
    parted = [compare(noted[0], other) for other in noted[1:]]
    evidence["trials"].append({**where(), "environment": environment, "against_the_first": parted})
    write_json(out, evidence)
    for number, entries in enumerate(parted, 2):
        print(number, *entries, sep="\n  ")


if __name__ == "__main__":
    app()
