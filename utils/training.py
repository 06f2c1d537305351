"""Around `trainer.train()`: callbacks for progress, tracking and health, checkpoints to resume from, the log."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from utils.errors import TrainingError
from utils.files import atomic, atomic_folder, digests, record_files
from utils.platforms import peak_memory
from utils.progress import Progress
from utils.rundir import StageRun
from utils.tracking import Tracker

_PATIENCE = 5  # non-finite steps in a row before a run is ended; fp16's scaler skips a few at the start, normally


class ProgressCallback(TrainerCallback):
    """Draws the bar: step, loss."""

    def on_train_begin(self, args, state, control, **_):
        self.bar = Progress("training", state.max_steps, "step")
        self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        last = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        self.bar.update(1, note="" if last is None else f"loss {float(last):.3f}")

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


class TrackingCallback(TrainerCallback):
    """Sends loss, learning rate, gradient norm and memory to the tracker."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker

    def on_log(self, args, state, control, logs=None, **_):
        names = ("loss", "learning_rate", "grad_norm", "mean_token_accuracy")
        values = {f"train/{name}": float(logs[name]) for name in names if name in (logs or {})}
        if values:
            memory = {f"memory/{name}": value for name, value in peak_memory().items()}
            self.tracker.log(values | memory, step=state.global_step)


class HealthCallback(TrainerCallback):
    """Ends the run with a sentence when loss or gradient stay non-finite."""

    def __init__(self):
        self.bad_steps = 0

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in (logs or {}):
            return
        finite = all(math.isfinite(float(logs[name])) for name in ("loss", "grad_norm") if name in logs)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps >= _PATIENCE:
            raise TrainingError(
                f"Loss or gradient was not finite {_PATIENCE} times in a row, last at step {state.global_step}; "
                "lower train.learning_rate or train.max_grad_norm and run 03 again."
            )


def checkpoint_dir(run: StageRun) -> Path:
    """Where this run's checkpoints go: a folder named by what they rest on, so that no other run's are resumed."""
    inputs = digests(record_files(run.path, run.stage.inputs))
    basis = json.dumps([run.settings(run.stage), run.record(run.stage)["computed_on"], inputs], sort_keys=True)
    return run.file("training/checkpoints") / hashlib.sha256(basis.encode()).hexdigest()[:12]


def find_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint in `folder`, to pass as resume_from_checkpoint; None to start from the beginning."""
    if not folder.is_dir():
        return None
    for path in folder.glob("checkpoint-*"):
        # The Trainer writes trainer_state.json last: without it the process died while saving.
        if not (path / "trainer_state.json").exists():
            shutil.rmtree(path)
    return get_last_checkpoint(str(folder))


def training_log(trainer) -> pd.DataFrame:
    """step, loss, learning_rate, grad_norm, mean_token_accuracy for every logged step, resumed ones included."""
    names = ["step", "loss", "learning_rate", "grad_norm", "mean_token_accuracy"]
    rows = [entry for entry in trainer.state.log_history if "loss" in entry]
    log = pd.DataFrame(rows, columns=names)
    return log.apply(pd.to_numeric, errors="coerce")


def check_loss_mask(dataset, formatted: pd.DataFrame) -> str:
    """Compare what the trainer will count with what notebook 02 counted; returns both in words.

    `dataset` is the trainer's, one sequence for each row or for each pack of rows; `formatted` has `tokens` and
    `counted` for each row. Raises TrainingError where tokens or counted tokens differ in sum: a backend that masks
    otherwise, or cuts rows, would train another objective without a word.
    """
    tokens = counted = 0
    for sequence in dataset:
        tokens += len(sequence["input_ids"])
        if "labels" in sequence:  # what the collator takes; a completion_mask beside them was folded in, or not meant
            counted += sum(label != -100 for label in sequence["labels"])
        else:
            counted += sum(sequence.get("completion_mask", [1] * len(sequence["input_ids"])))
    wanted = (int(formatted["tokens"].sum()), int(formatted["counted"].sum()))
    if (tokens, counted) != wanted:
        raise TrainingError(
            f"The trainer holds {tokens} tokens with {counted} in the loss; 02 formatted {wanted[0]} with {wanted[1]}: "
            "run 02 again, and check that the pinned versions are installed."
        )
    return f"{len(dataset)} sequences hold {tokens:,} tokens, {counted:,} of them in the loss: exactly those of 02"


def save_adapter(model, tokenizer, run: StageRun, log: pd.DataFrame) -> None:
    """training/adapter (safetensors and tokenizer) and training/log.csv."""
    tokenizer.padding_side = "right"
    with atomic_folder(run.file("training/adapter")) as folder:
        model.save_pretrained(str(folder), safe_serialization=True)
        tokenizer.save_pretrained(str(folder))
    with atomic(run.file("training/log.csv")) as path:
        log.to_csv(path, index=False)


def memory_report() -> str:
    """Memory of this process in one line, before and after training."""
    import torch

    parts = [f"process {peak_memory()['rss_gib']:.2f} GiB at its peak"]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        name, total = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
        reserved = torch.cuda.max_memory_reserved(0) / 2**30
        parts.append(f"{name}: {reserved:.2f} of {total:.1f} GiB reserved at the peak")
    return ", ".join(parts)
