"""Where trainings by two processes begin to differ, bit by bit: two undisturbed ones, and one that resumed.

    python -m benchmarks.parting measure --out parting.json

The demo's task as in `benchmarks.several`, a few updates, several times from the same rows and weights, and once from the
checkpoint in the middle. At each update each process notes digests of its rows and fp16's scale, of its weights, of its own
gradients before they are added up, and of what the optimizer gets. Backward passes run from the last layer to the first, so
the first matrix that differs, in that order, is where it enters. `--by-time` lets inductor choose kernels by how fast they
are, as it does by itself and the series does not. What the environment sets (TORCH_COMPILE_DISABLE=1) holds for all runs.
Without a GPU it is a dry run on the CPU.
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

PROCESSES = 2
_DECISIVE = ("TORCH_COMPILE_DISABLE", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
_BY_TIME = "PARTING_BY_TIME"  # tells the processes

app = typer.Typer()


class Digests(TrainerCallback):
    """Notes, for every update by its number: {"given", "weights", "own", "summed"}, of each a digest for each name."""

    def __init__(self, trainer, path: Path):
        self.trainer, self.path, self.updates, self.rows = trainer, path, {}, []
        take = trainer.get_batch_samples

        def noting(*arguments, **keywords):
            batches, items = take(*arguments, **keywords)
            self.rows = [digest(batch["input_ids"]) for batch in batches]
            return batches, items

        trainer.get_batch_samples = noting

    def on_train_begin(self, args, state, control, **_):
        wrapped = self.trainer.model_wrapped
        self.names = {id(weight): name for name, weight in wrapped.module.named_parameters() if weight.requires_grad}
        wrapped.register_comm_hook(None, self.add_up)

    def on_step_begin(self, args, state, control, model=None, **_):
        scaler = self.trainer.accelerator.scaler
        given = {"rows": " ".join(self.rows), "scale": str(scaler.get_scale() if scaler else None)}
        weights = {name: digest(weight) for name, weight in last_first(model)}
        self.now = self.updates[state.global_step + 1] = {"given": given, "weights": weights, "own": {}, "summed": {}}

    def add_up(self, _, bucket):
        """What DistributedDataParallel does with a bucket of gradients, once they are noted."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        for weight, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self.now["own"][self.names[id(weight)]] = digest(gradient)
        return allreduce_hook(None, bucket)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        own = self.now["own"]
        self.now["summed"] = {name: digest(weight.grad) for name, weight in last_first(model)}
        self.now["own"] = {name: own[name] for name in self.now["summed"]}

    def on_train_end(self, args, state, control, **_):
        write_json(self.path, self.updates)


def last_first(model) -> list[tuple]:
    """(name, weight) of what is trained, the last layer's first."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad][::-1]


def digest(tensor) -> str:
    """Of a tensor's bits."""
    return digest_of(tensor.detach().float().cpu().numpy().tobytes().hex(), length=12)


@app.command()
def worker(run_dir: Path, folder: Path) -> None:
    """One of the processes that `accelerate launch` starts: trains, and leaves FOLDER/RANK.json."""
    from torch._inductor import config as inductor

    from utils.hardware import global_rank
    from utils.training import launch

    as_written = launch.read_recipe

    def read_recipe(run):
        load_with_lora, make_trainer = as_written(run)

        def noting(*given, **more):
            if _BY_TIME in os.environ:
                inductor.deterministic = False
            trainer = make_trainer(*given, **more)
            trainer.add_callback(Digests(trainer, folder / f"{global_rank()}.json"))
            return trainer

        return load_with_lora, noting

    launch.read_recipe = read_recipe
    launch.run_worker(str(run_dir))


def train(run_dir: Path, folder: Path, updates: list[int], checkpoint: int) -> list[dict]:
    """What each process noted of the `updates` of a training in `run_dir`; SystemExit where it failed, or made others."""
    settings = several.settings(PROCESSES) | {"train.max_steps": updates[-1], "train.save_steps": checkpoint}
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
    noted = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]
    if any([*map(int, one)] != updates for one in noted):
        raise SystemExit(f"expected the updates {updates}, but {run_dir} made {[[*one] for one in noted]}")
    return noted


def compare(one: list[dict], other: list[dict]) -> list[dict]:
    """How many digests differ between two trainings, and the first that does, at each update and process where any does."""
    found = []
    for update in other[0]:
        for rank, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            entry: dict = {"update": int(update), "process": rank}
            for kind, digests in mine[update].items():
                differ = [name for name, value in digests.items() if theirs[update][kind].get(name) != value]
                entry[kind] = {"of": len(digests), "differ": len(differ), "first": differ[0] if differ else None}
            if any(entry[kind]["differ"] for kind in mine[update]):
                found.append(entry)
    return found


@app.command()
def measure(
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    runs: Annotated[int, typer.Option(help="Undisturbed trainings, each compared with the first.")] = 2,
    by_time: Annotated[bool, typer.Option("--by-time", help="Let inductor choose kernels by their time.")] = False,
    updates: Annotated[int, typer.Option(help="Updates of a training.")] = 8,
    checkpoint: Annotated[
        int, typer.Option(help="Resume after this update: half of --updates or more, as two are kept.")
    ] = 4,
) -> None:
    """Train several times, resume the first from its checkpoint, and add to OUT where each parts from the first."""
    evidence = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"trials": []}
    if by_time:
        os.environ[_BY_TIME] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        place, noted = Path(scratch), []
        for stage in ("00", "02"):
            several.run(place / "base", 1, stage)
        for number in range(runs + 1):
            shutil.copytree(place / ("base" if number < runs else "run-0"), place / f"run-{number}")
            for later in place.glob(f"run-{number}/training/checkpoints/*/checkpoint-*"):
                if later.name != f"checkpoint-{checkpoint}":
                    shutil.rmtree(later)
            folder, first = place / f"digests-{number}", 1 if number < runs else checkpoint + 1
            folder.mkdir()
            noted.append(train(place / f"run-{number}", folder, [*range(first, updates + 1)], checkpoint))
            print(f"training {number + 1} of {runs + 1}: updates {first} to {updates}", flush=True)
    environment = {name: os.environ[name] for name in _DECISIVE if name in os.environ}
    *undisturbed, resumed = [compare(noted[0], other) for other in noted[1:]]
    parted = {"undisturbed": undisturbed, "resumed": resumed}
    digests = sum(map(len, noted[0][0]["1"].values()))
    counts = {"by_time": by_time, "updates": updates, "checkpoint": checkpoint, "digests_of_an_update": digests}
    evidence["trials"].append({**where(), "environment": environment, **counts, **parted})
    write_json(out, evidence)
    for name, entries in [*((f"undisturbed {n}", one) for n, one in enumerate(undisturbed, 2)), ("resumed", resumed)]:
        print(name, *(entries or ["the same to the bit"]), sep="\n  ")


if __name__ == "__main__":
    app()
