"""One process's training: step plan, checkpoints to resume from, what to do when memory runs out, what is left at the end."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch
from transformers.trainer_callback import PrinterCallback

from utils.errors import Interrupted, SessionOver, TrainingError
from utils.files import atomic, atomic_folder, digests, parse_json, record_files, write_json
from utils.hardware import GIB, global_rank, peak_memory, resolve_hardware, world_size
from utils.models.load import count_fused_layers, torch_dtype, transformer_layers
from utils.models.memory import free_memory, is_out_of_memory
from utils.pipeline.signals import StopRequest
from utils.pipeline.stage import StageRun
from utils.pipeline.time_limit import Deadline
from utils.report.figures import draw_loss
from utils.report.tracking import Tracker
from utils.schema import Config
from utils.training.callbacks import HealthCallback, ProgressCallback, SessionCallback, Stopwatch, TrackingCallback
from utils.training.launch import SUMMARY, RestartSmaller
from utils.training.step_plan import (
    StepPlan,
    choose_plan,
    fall_back,
    recompute_as,
    release_trainer,
    trainable_weights,
)


def train_here(run: StageRun, load_with_lora: Callable, make_trainer: Callable) -> None:
    """Train in this process, one of `world_size()`; the first one leaves adapter, log, curve and training/summary.json.

    Resumes from the last checkpoint of the same rows and settings. Raises SessionOver or Interrupted, with a checkpoint
    saved, where the session ends before the work does, and RestartSmaller where one of several ran out of memory.
    """
    rows = pd.read_parquet(run.file("data/formatted/train.parquet"))
    model, tokenizer = load_with_lora(run.config)
    figures = describe_model(model, run.config)
    plan, first = choose_plan(run, model, tokenizer, rows, make_trainer, world_size()), trainable_weights(model)
    tracker = Tracker(run, job_type="train") if global_rank() == 0 else None
    try:
        while (trained := _train_by(plan, run, model, tokenizer, rows, make_trainer, tracker)) is None:
            free_memory(model)
            plan = _resume_smaller(run, plan, model, first)
        trainer, watch = trained
        print(f"after: {memory_report()}")
        if tracker is not None:
            log = training_log(trainer)
            save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run, log)
            tracker.image("loss", draw_loss(log, run.file("training/loss.png")))
            tracker.image("lengths", run.file("data/lengths.png"))
            figures |= {"steps": trainer.state.global_step, "processes": world_size(), **asdict(plan)}
            figures |= _speed(watch, run)
            last = float(log["loss"].tail(5).mean()) if len(log) else math.nan
            figures["final_loss"] = round(last, 4) if math.isfinite(last) else "none"
            summary = {"figures": figures, "peak_memory": peak_memory(), "update_seconds": watch.seconds()}
            write_json(run.file(SUMMARY), summary)
    finally:
        if tracker is not None:
            tracker.finish()  # also after an error: what was logged so far is worth keeping


def _train_by(plan: StepPlan, run: StageRun, model, tokenizer, rows: pd.DataFrame, make_trainer, tracker):
    """(trainer, stopwatch) once the last update is done, None where memory ran out; raises where the session ends."""
    config, folder = run.config, checkpoint_dir(run)
    trainer = make_trainer(model, tokenizer, config, rows, plan, str(folder))
    print(check_loss_mask(trainer.train_dataset, rows))
    print(f"{plan}, {world_size()} process{'es' if world_size() > 1 else ''}; before: {memory_report()}")
    if trainer.args.device.type == "cpu":
        # accelerate calls a CPU that several processes share cpu:0, to which torch cannot load a checkpoint's optimizer.
        # transformers 5.17 asks for just that. To be retired when it loads to where the optimizer's state is.
        trainer.args.__dict__["_setup_devices"] = torch.device("cpu")
    trainer.remove_callback(PrinterCallback)  # the bar shows what it would print
    session = SessionCallback(Deadline.of(config.hardware.max_hours), StopRequest())
    shown = [ProgressCallback(), TrackingCallback(tracker)] if tracker is not None else []
    for callback in (HealthCallback(trainer.accelerator.scaler), session, *shown):
        trainer.add_callback(callback)
    recompute_as(trainer, config, plan)
    watch = Stopwatch(trainer)
    null_run = config.train.max_steps == 0  # for testing the comparison: the adapter stays as it was initialised
    with session.stop:
        done = null_run or _train(trainer, find_checkpoint(folder))
    if not done:
        release_trainer(trainer)
        return None
    if session.ended:
        if tracker is not None:
            save_log(training_log(trainer), run)  # for whoever looks at the session's end
        stopped = f"Training stopped at step {trainer.state.global_step} of {trainer.state.max_steps} with a checkpoint"
        if session.ended == "asked":
            raise Interrupted(f"{stopped}, because it was asked to; run 03 again, it resumes from there.")
        why = session.deadline.sentence()
        raise SessionOver(f"{stopped}, because {why}; run 03 again in the next session, it resumes from there.")
    return trainer, watch


def _train(trainer, checkpoint: str | None) -> bool:
    """Whether it came to its end; False where memory ran out."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.close()
    return True


def _resume_smaller(run: StageRun, plan: StepPlan, model, first: dict) -> StepPlan:
    """The plan to resume with after `plan` ran out of memory; raises RestartSmaller where there are several processes."""
    smaller, last = fall_back(run, plan, len(transformer_layers(model))), find_checkpoint(checkpoint_dir(run))
    message = f"Out of memory with {plan}; resuming from {Path(last).name if last else 'the start'} with {smaller}."
    if world_size() > 1:
        raise RestartSmaller(message)
    print(message)
    if last is None:
        model.load_state_dict(first, strict=False)
    return smaller


def _speed(watch: Stopwatch, run: StageRun) -> dict[str, float]:
    """Seconds from the stage's start to the first update's end, and the medians of this process's updates after it."""
    if not watch.speeds():
        return {}
    began = datetime.fromisoformat(run.record(run.stage)["started"]).timestamp()
    return {
        "seconds_to_first_update": round(time.time() - (time.monotonic() - watch.ends[0]) - began, 1),
        "tokens_per_second": round(statistics.median(watch.speeds())),
        "seconds_per_update": round(statistics.median(watch.seconds()), 4),
    }


def checkpoint_dir(run: StageRun) -> Path:
    """Where this run's checkpoints go: a folder named by settings and rows, so that no other run's are resumed."""
    inputs = digests(record_files(run.path, run.stage.inputs))
    basis = json.dumps([run.settings(run.stage), run.record(run.stage)["computed_on"], inputs], sort_keys=True)
    return run.file("training/checkpoints") / hashlib.sha256(basis.encode()).hexdigest()[:12]


def find_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in `folder` that was finished, to pass as resume_from_checkpoint; None to start anew.

    The trainer writes trainer_state.json last; each process writes its random state by itself, maybe later than that.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        of_each = [checkpoint / f"rng_state_{rank}.pth" for rank in range(world_size())]
        try:
            parse_json((checkpoint / "trainer_state.json").read_bytes())
            if zipfile.is_zipfile(checkpoint / "rng_state.pth") or all(map(zipfile.is_zipfile, of_each)):
                return str(checkpoint)
        except (OSError, ValueError):
            pass
        print(f"{checkpoint.name} was not finished, and is passed over.")
    return None


def training_log(trainer) -> pd.DataFrame:
    """step, loss, learning_rate, grad_norm, mean_token_accuracy, scale (fp16's) for every logged step, resumed ones too."""
    names = ["step", "loss", "learning_rate", "grad_norm", "mean_token_accuracy", "scale"]
    rows = [entry for entry in trainer.state.log_history if "loss" in entry]
    return pd.DataFrame(rows, columns=names).apply(pd.to_numeric, errors="coerce")


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
        # peft keeps sets and writes them in the order of this process's hashes: the same adapter, but not the same file.
        path = folder / "adapter_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        lists = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")
        write_json(
            path, settings | {key: sorted(settings[key]) for key in lists if isinstance(settings.get(key), list)}
        )
    save_log(log, run)


def save_log(log: pd.DataFrame, run: StageRun) -> None:
    """training/log.csv."""
    with atomic(run.file("training/log.csv")) as path:
        log.to_csv(path, index=False)


def describe_model(model, config: Config) -> dict:
    """Backend, device, trainable parameters and fused layers: printed, and returned for the manifest."""
    backend, fused = resolve_hardware(config.hardware)["backend"], count_fused_layers(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"backend {backend}, {model.device}, {torch_dtype(config)}")
    print(f"{trainable:,} trainable parameters; fused layers: {fused or 'none (plain backend)'}")
    return {"backend": backend, "trainable_parameters": trainable} | {f"fused_{k}": n for k, n in (fused or {}).items()}


def memory_report() -> str:
    """Memory of this process in one line, before and after training."""
    report = f"process {peak_memory()['rss_gib']:.2f} GiB at its peak"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gpu, reserved = torch.cuda.get_device_properties(), torch.cuda.max_memory_reserved() / GIB
        report += f", {gpu.name}: {reserved:.2f} of {gpu.total_memory / GIB:.1f} GiB reserved at the peak"
    return report
