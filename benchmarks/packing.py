"""Whether packing learns as much on a real model: one seed by both recipes, on the rows of a run of profile smollm2.

    python -m benchmarks.packing RUN_DIR 1 /tmp/parity

Both recipes see the same rows equally often and as many in an update, under unsloth, in the run's dtype and with its other
settings; then the loss of the held-out rows is compared. `benchmarks.smollm2` starts it for each seed, and puts them
together in parity.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from scipy import stats

from benchmarks.evidence import add_to_file
from benchmarks.recipe import notebook_functions
from utils.config import parse_overrides, read_config
from utils.data.prompts import format_row
from utils.pipeline.run_dir import open_run
from utils.pipeline.stage import StageRun
from utils.pipeline.stages import BY_NAME

PLAIN_STEPS = {
    "train.step_plan": "given",
    "train.gradient_checkpointing": False,
    "train.gradient_accumulation_steps": 1,
}


def ratio_over_seeds(runs: dict[str, dict]) -> dict:
    """Geometric mean over seeds of packed / padded held-out loss, with its 95 % t interval (None for fewer than two)."""
    logs = np.log([run["packed"]["nll"] / run["padded"]["nll"] for run in runs.values()])
    if len(logs) < 2:
        return {"nll_ratio": None, "ci95": None}
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    ratio, *ci95 = (round(float(np.exp(logs.mean() + shift)), 5) for shift in (0, -half, half))
    return {"nll_ratio": ratio, "ci95": ci95}


def held_out_rows(run) -> pd.DataFrame:
    """id, prompt and completion of a run's held-out rows."""
    rows = pd.read_parquet(run.file("data/eval.parquet"))
    pairs = [format_row(row, run.config.prompt) for row in rows.to_dict("records")]
    return pd.DataFrame(pairs, columns=["prompt", "completion"]).assign(id=rows["id"].to_numpy())


def train_once(config, folder: Path, rows: pd.DataFrame):
    """(trainer, tokenizer, plan) after training on `rows` by notebook 03's own functions."""
    from utils.training.step_plan import choose_plan, recompute_as

    load_with_lora, make_trainer = notebook_functions()
    model, tokenizer = load_with_lora(config)
    (folder / "training").mkdir(parents=True, exist_ok=True)
    plan = choose_plan(StageRun(folder, config, BY_NAME["03_lora_training"]), model, tokenizer, rows, make_trainer)
    trainer = make_trainer(model, tokenizer, config, rows, plan, str(folder / "checkpoints"))
    recompute_as(trainer, config, plan)
    trainer.train()
    return trainer, tokenizer, plan


def main(
    run_dir: Path,
    seed: int,
    out: Annotated[Path, typer.Argument(help="A folder; the losses go to seed-NN.json in it.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of both recipes.")] = None,
) -> None:
    """Train on the run's rows by both recipes, and write mean held-out losses (nats per token) and updates."""
    os.environ["UNSLOTH_DISABLE_AUTO_PADDING_FREE"] = "1"  # it would lay rows end to end where they are to be padded
    run, found = open_run("auto", run_dir), {}
    rows, more = pd.read_parquet(run.file("data/formatted/train.parquet")), parse_overrides(set_ or [])
    recipe = {"train.packing": True}
    for name in ("packed", "padded"):
        config = read_config(run.path / "config.yaml", {"train.seed": seed, **PLAIN_STEPS, **recipe, **more})
        trainer, tokenizer, plan = train_once(config, out / f"seed-{seed:02}-{name}", rows)
        updates = trainer.state.global_step
        found[name] = {"updates": updates, "plan": str(plan), "nll": held_out_loss(trainer, tokenizer, run)}
        as_many = max(1, round(len(rows) * config.train.num_train_epochs / updates))
        recipe = {"train.packing": False, "train.per_device_train_batch_size": as_many}
    add_to_file(out / f"seed-{seed:02}.json", found)


def held_out_loss(trainer, tokenizer, run) -> float:
    """The trained model's loss on the run's held-out rows, as 04 measures it."""
    from utils.evaluation.loss import completion_loss
    from utils.evaluation.metrics import loss_per_token
    from utils.models.load import ready_for_inference
    from utils.training.step_plan import release_trainer

    release_trainer(trainer)
    model = ready_for_inference(trainer.model)
    losses = completion_loss(model, tokenizer, held_out_rows(run), run.config.model.max_seq_length)
    return round(float(loss_per_token(losses)["completion"].mean()), 6)


if __name__ == "__main__":
    typer.run(main)
