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
from utils.files import atomic, digests, record_files
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
    basis = json.dumps([run.settings(run.stage), inputs], sort_keys=True)
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


def save_adapter(model, tokenizer, run: StageRun, log: pd.DataFrame, folder: Path) -> None:
    """training/adapter (safetensors and tokenizer) and training/log.csv; checkpoints of other settings are removed."""
    target, scratch = run.file("training/adapter"), run.file("training/.adapter.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    tokenizer.padding_side = "right"
    model.save_pretrained(str(scratch), safe_serialization=True)
    tokenizer.save_pretrained(str(scratch))
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    with atomic(run.file("training/log.csv")) as path:
        log.to_csv(path, index=False)
    for other in run.file("training/checkpoints").glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def memory_report() -> str:
    """Memory of this process in one line, before and after training."""
    import torch

    parts = [f"process {peak_memory()['rss_gib']:.2f} GiB at its peak"]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        name, total = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
        reserved = torch.cuda.max_memory_reserved(0) / 2**30
        parts.append(f"{name}: {reserved:.2f} of {total:.1f} GiB reserved at the peak")
    return ", ".join(parts)
