"""Whether packing learns as much: the demo's task on a CUDA GPU, against the same rows unpacked under unsloth.

    python -m benchmarks.parity --out benchmarks/results/parity.json

Both recipes see the same rows equally often, about sixteen in an update, from the same base in fp16 with a T4's limits;
three seeds each. Then the held-out loss and the answers to the held-out questions are compared. It also stops one training
and resumes from its checkpoint, and trains the same thing twice, to tell what a GPU repeats.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from benchmarks.evidence import add_to_file, where
from benchmarks.recipe import notebook_functions
from utils.config import load_config
from utils.data import synthetic as demo_data
from utils.data.prompts import format_prompt, format_row
from utils.evaluation.questions import Question
from utils.hardware import gpus
from utils.pipeline.stage import StageRun
from utils.pipeline.stages import BY_NAME

SEEDS = (1, 2, 3)
RECIPES = {
    "tutorial": {"train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 2},
    "ours": {"train.packing": True, "train.step_plan": "auto", "model.max_seq_length": 480,
             "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 1},
}  # fmt: skip


def load_recipe(name: str, seed: int, more: dict | None = None):
    """The demo's configuration on the GPU there is, by one of the two recipes."""
    settings = {"train.seed": seed, "train.gradient_checkpointing": True, "train.save_steps": 60, **RECIPES[name]}
    if gpus():
        settings |= {"hardware.device": "cuda", "hardware.dtype": "float16", "hardware.emulate_t4": True,
                     "hardware.backend": "unsloth", "train.optim": "adamw_8bit"}  # fmt: skip
    return load_config("demo", settings | (more or {}))


def demo_rows(config, tokenizer) -> pd.DataFrame:
    """The demo's training rows: prompt, completion and tokens."""
    from utils.models.prompt_format import tokenize_row

    pairs = [format_row(row, config.prompt) for row in demo_data.tuning_rows("train", config.data.train_rows)]
    rows = pd.DataFrame(pairs, columns=["prompt", "completion"])
    return rows.assign(tokens=[len(tokenize_row(tokenizer, *pair)["input_ids"]) for pair in pairs])


def train_once(config, folder: Path, steps: int | None = None, resume: str | None = None, rows=None):
    """(trainer, tokenizer, plan) after training on `rows` or the demo's, to the end or for `steps` updates."""
    from utils.training.step_plan import choose_plan, recompute_as

    load_with_lora, make_trainer = notebook_functions()
    model, tokenizer = load_with_lora(config)
    rows = demo_rows(config, tokenizer) if rows is None else rows
    (folder / "training").mkdir(parents=True, exist_ok=True)
    plan = choose_plan(StageRun(folder, config, BY_NAME["03_lora_training"]), model, tokenizer, rows, make_trainer)
    trainer = make_trainer(model, tokenizer, config, rows, plan, str(folder / "checkpoints"))
    recompute_as(trainer, config, plan)
    if steps:
        stop_after(trainer, steps)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, tokenizer, plan


def stop_after(trainer, steps: int) -> None:
    """End the training after `steps` updates, the schedule left as if it went on."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= steps

    trainer.add_callback(Stop())


def held_out(model, tokenizer, config) -> dict[str, np.ndarray]:
    """Per held-out question: loss of the completion (nats per token) and whether the answer is right; and the groups."""
    from utils.evaluation.generate import answer_questions
    from utils.evaluation.loss import completion_loss
    from utils.evaluation.metrics import score_answers
    from utils.models.load import ready_for_inference

    rows = pd.DataFrame(demo_data.tuning_rows("test", config.data.eval_rows))
    rows["id"] = [f"q{i:04d}" for i in range(len(rows))]
    pairs = [format_row(row, config.prompt) for row in rows.to_dict("records")]
    frame = pd.DataFrame({"id": rows["id"], "prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
    nll = completion_loss(model, tokenizer, frame, max_length=10**9).set_index("id")
    tokens = nll["reasoning_tokens"] + nll["response_tokens"]
    questions = [Question(row.id, "open", format_prompt(row.Question, config.prompt)) for row in rows.itertuples()]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "answers.jsonl"
        answers = answer_questions(ready_for_inference(model), tokenizer, questions, config.generate, path, "parity")
    scored = score_answers({a["id"]: a for a in answers}, rows, None)
    return {
        "nll": ((nll["reasoning_nll"] + nll["response_nll"]) / tokens).loc[scored["id"]].to_numpy(),
        "correct": scored["correct"].to_numpy(),
        "group": scored["group"].to_numpy(),
    }


def losses(trainer) -> list[float]:
    """The logged loss of every update."""
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def main(out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")]) -> None:
    """Train three seeds by each recipe, stop and resume one, and write OUT."""
    from utils.evaluation.statistics import compare_paired
    from utils.models.memory import free_memory
    from utils.training.step_plan import release_trainer
    from utils.training.train import find_checkpoint

    evidence: dict = {
        "what": "the demo's task, fp16: packed and fitted against unpacked rows 8 x 2, same rows equally often",
        **where(),
        "runs": {},
    }
    found: dict[str, list[dict]] = {name: [] for name in RECIPES}
    first: list[float] = []
    for seed in SEEDS:
        for name in RECIPES:
            config = load_recipe(name, seed)
            with tempfile.TemporaryDirectory() as scratch:
                trainer, tokenizer, plan = train_once(config, Path(scratch))
                first = first or losses(trainer)
                updates = trainer.state.global_step
                release_trainer(trainer)
                model = trainer.model
                del trainer
                measured = held_out(model, tokenizer, config)
            found[name].append(measured)
            evidence["runs"][f"{name}, seed {seed}"] = {
                "nll": round(float(measured["nll"].mean()), 5),
                "accuracy": round(float(measured["correct"].mean()), 4),
                "updates": updates,
                "fit": str(plan),
            }
            del model
            free_memory()
            add_to_file(out, evidence)
            print(name, seed, evidence["runs"][f"{name}, seed {seed}"], flush=True)
    pooled = {name: {key: np.concatenate([m[key] for m in runs]) for key in runs[0]} for name, runs in found.items()}
    groups = list(pooled["ours"]["group"])
    accuracy = compare_paired("accuracy", pooled["tutorial"]["correct"], pooled["ours"]["correct"], groups)
    evidence["nll_ratio"] = round(float(pooled["ours"]["nll"].mean() / pooled["tutorial"]["nll"].mean()), 4)
    evidence["accuracy"] = {"tutorial": accuracy.base, "ours": accuracy.tuned, "difference": accuracy.difference,
                            "ci95": accuracy.ci95, "n": accuracy.n}  # fmt: skip
    add_to_file(out, evidence)
    with tempfile.TemporaryDirectory() as scratch:
        config = load_recipe("tutorial", SEEDS[0])
        again = losses(train_once(config, Path(scratch) / "again")[0])
        evidence["same_seed_twice"] = {
            "largest_loss_difference": max(abs(a - b) for a, b in zip(first, again, strict=True))
        }
        train_once(config, Path(scratch) / "torn", steps=97)
        checkpoint = find_checkpoint(Path(scratch) / "torn" / "checkpoints")
        resumed = losses(train_once(config, Path(scratch) / "torn", resume=checkpoint)[0])
    evidence["resume"] = {
        "stopped_after": 97,
        "resumed_from": int(checkpoint.rsplit("-", 1)[1]),
        "last_loss_difference": abs(resumed[-1] - first[-1]),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(first, resumed, strict=True)),
    }
    add_to_file(out, evidence)
    print(json.dumps({key: evidence[key] for key in ("nll_ratio", "accuracy", "same_seed_twice", "resume")}))


if __name__ == "__main__":
    typer.run(main)
