"""One process's training: step plan, checkpoints to resume from, what to do when memory runs out, what is left at the end."""

import ast
import contextlib
import math
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch
from transformers.trainer_callback import PrinterCallback, TrainerState

from utils.errors import Interrupted, OutOfMemory, SessionOver, TrainingError
from utils.files import atomic, atomic_folder, digest_of, digests, read_json, record_files, write_json
from utils.hardware import global_rank, peak_memory, resolve_hardware, world_size
from utils.models.load import count_fused_layers, torch_dtype, transformer_layers
from utils.models.memory import free_memory
from utils.pipeline.signals import StopRequest
from utils.pipeline.stage import StageRun
from utils.pipeline.stages import BY_NAME
from utils.pipeline.time_limit import Deadline
from utils.report.figures import draw_loss
from utils.report.tracking import Tracker
from utils.schema import Config
from utils.training import step_plan as plans
from utils.training.callbacks import BestCallback, HealthCallback, SessionCallback, ShowCallback, Stopwatch
from utils.training.launch import RECIPE, SUMMARY


def train_here(run: StageRun, load_with_lora: Callable, make_trainer: Callable) -> None:
    """Train in this process, one of `world_size()`; the first one leaves adapter, log, curve and training/summary.json.

    Resumes from the last checkpoint of the same rows, settings and recipe. Raises SessionOver or Interrupted, with a checkpoint
    saved, where the session ends before the work does, and OutOfMemory where there is no smaller plan to fall back to.
    """
    rows = pd.read_parquet(run.file("data/formatted/train.parquet"))
    model, tokenizer = load_with_lora(run.config)
    figures = _describe_model(model, run.config)
    plan = plans.choose_plan(run, model, tokenizer, rows, make_trainer, world_size())
    first = plans.trainable_weights(model)
    tracker = Tracker(run, job_type="train") if global_rank() == 0 else None
    try:
        while (trained := _train_by(plan, run, model, tokenizer, rows, make_trainer, tracker)) is None:
            free_memory(model)
            plan = _fall_back(run, plan, model, first)
        trainer, watch = trained
        if tracker is not None:
            log = training_log(trainer)
            save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run, log)
            tracker.image("loss", draw_loss(log, run.file("training/loss.png")))
            tracker.image("lengths", run.file("data/lengths.png"))
            figures |= {"steps": trainer.state.global_step, "processes": world_size(), **asdict(plan)}
            names = ("optim", "learning_rate", "lr_scheduler_type", "seed")  # as in the cell, which can be edited
            figures |= {name: getattr(value := getattr(trainer.args, name), "value", value) for name in names}
            if watch.ends:
                began = datetime.fromisoformat(run.record(run.stage)["started"]).timestamp()
                passed = time.time() - began - (time.monotonic() - watch.ends[0])
                figures["seconds_to_first_update"] = round(passed, 1)
            if log["eval_loss"].notna().any():
                kept = trainer.state.best_global_step if run.config.train.keep == "best" else trainer.state.global_step
                figures |= {"kept_step": kept, "lowest_validation_loss": round(float(log["eval_loss"].min()), 4)}
            last = float(log["loss"].tail(5).mean()) if len(log) else math.nan
            figures["final_loss"] = round(last, 4) if math.isfinite(last) else "none"
            summary = {"figures": figures, "peak_memory": peak_memory(), "update_seconds": watch.seconds()}
            write_json(run.file(SUMMARY), summary)
    finally:
        if tracker is not None:
            tracker.finish()  # also after an error: what was logged so far is worth keeping


def _train_by(plan: plans.StepPlan, run: StageRun, model, tokenizer, rows: pd.DataFrame, make_trainer, tracker):
    """(trainer, stopwatch) once the last update is done, None where memory ran out; raises where the session ends."""
    config, folder = run.config, checkpoint_dir(run)
    validated, path = config.data.validation_rows, run.file("data/formatted/validation.parquet")
    validation = pd.read_parquet(path) if validated else None
    trainer = make_trainer(model, tokenizer, config, rows, plan, str(folder), validation)
    print(check_loss_mask(trainer.train_dataset, rows))
    if validated:
        check_loss_mask(trainer.eval_dataset, validation)
    print(f"{plan}, {world_size()} process{'es' if world_size() > 1 else ''}")
    if trainer.args.device.type == "cpu":
        # accelerate calls a CPU that several processes share cpu:0, to which torch cannot load a checkpoint's optimizer.
        # transformers 5.17 asks for just that. To be retired when it loads to where the optimizer's state is.
        trainer.args.__dict__["_setup_devices"] = torch.device("cpu")
    trainer.remove_callback(PrinterCallback)  # the bar shows what it would print
    session = SessionCallback(Deadline.of(config.hardware.max_hours), StopRequest())
    shown = ShowCallback(tracker, run.record(BY_NAME["01_baseline_inference"]).get("seconds"))
    for callback in (HealthCallback(trainer.accelerator.scaler), session, *([shown] if tracker is not None else [])):
        trainer.add_callback(callback)
    if trainer.args.load_best_model_at_end:
        trainer.add_callback(BestCallback())
    plans.recompute_as(trainer, config, plan)
    watch, checkpoint = Stopwatch(trainer), find_checkpoint(folder)
    untrained = config.train.max_steps == 0  # for testing the comparison: the adapter stays as it was initialised
    if untrained or (checkpoint and _is_of_last_update(trainer, checkpoint)):
        return trainer, watch
    try:
        with session.stop:
            fits = plans.train_if_it_fits(trainer, checkpoint)
    finally:
        shown.close()
    if not fits:
        plans.release_trainer(trainer)
        return None
    if session.ended:
        if tracker is not None:
            _save_log(training_log(trainer), run)  # for whoever looks at the session's end
        raise _end_of_session(trainer, session)
    return trainer, watch


def _end_of_session(trainer, session: SessionCallback) -> Interrupted | SessionOver:
    stopped = f"Training stopped at step {trainer.state.global_step} of {trainer.state.max_steps} with a checkpoint"
    if session.ended == "asked":
        return Interrupted(f"{stopped}, because it was asked to; run 03 again, it resumes from there.")
    why = session.deadline.sentence()
    return SessionOver(f"{stopped}, because {why}; run 03 again in the next session, it resumes from there.")


def _is_of_last_update(trainer, checkpoint: str) -> bool:
    """Whether a training ended with `checkpoint`: its log and what is kept are loaded then, since the trainer would go on."""
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback")
    waited = stopping["attributes"]["early_stopping_patience_counter"] if stopping else 0
    if state.global_step < state.max_steps and not (stopping and waited >= stopping["args"]["early_stopping_patience"]):
        return False
    kept = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    adapter = Path(checkpoint).with_name(f"checkpoint-{kept}")
    trainer.model.load_adapter(str(adapter), trainer.model.active_adapters[0], is_trainable=True)
    trainer.state = state
    return True


def _fall_back(run: StageRun, plan: plans.StepPlan, model, first: dict) -> plans.StepPlan:
    """Put a smaller plan on file after `plan` ran out of memory, and return it; raises OutOfMemory where there is none."""
    layers = len(transformer_layers(model)) if run.config.train.gradient_checkpointing else plan.recompute_layers
    if world_size() > 1:
        rows, most = run.config.train.rows_per_update, max(1, plan.per_device_train_batch_size // 2)
        micro = next(n for n in range(most, 0, -1) if rows % n == 0)
        given = f"train.per_device_train_batch_size={micro}, train.gradient_accumulation_steps={rows // micro}"
        smaller = micro < plan.per_device_train_batch_size or plan.recompute_layers < layers
        instead = f"set train.step_plan=given, {given}, or lower" if smaller else "lower"
        found = f"One of {world_size()} processes ran out of memory with {plan}"
        raise OutOfMemory(f"{found}; {instead} model.max_seq_length.")
    smaller, last = plans.smaller_plan(plan, layers), find_checkpoint(checkpoint_dir(run))
    write_json(run.file(plans.FILE), read_json(run.file(plans.FILE)) | {"step_plan": asdict(smaller)})
    print(f"Out of memory with {plan}; resuming from {Path(last).name if last else 'the start'} with {smaller}.")
    if last is None:
        model.load_state_dict(first, strict=False)
    return smaller


def checkpoint_dir(run: StageRun) -> Path:
    """Where this run's checkpoints go: a folder named by settings, rows and recipe, so that no other run's are resumed."""
    inputs, path = digests(record_files(run.path, run.stage.inputs)), run.file(RECIPE)
    recipe = ast.unparse(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ""  # without its comments
    basis = [run.settings(run.stage), run.record(run.stage)["computed_on"], inputs, recipe]
    return run.file("training/checkpoints") / digest_of(basis, length=12)


def find_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in `folder` that was finished, to pass as resume_from_checkpoint; None to start anew.

    The trainer writes trainer_state.json last; each process writes its random state by itself, maybe later than that.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        of_each = [checkpoint / f"rng_state_{rank}.pth" for rank in range(world_size())]
        with contextlib.suppress(OSError, ValueError):
            read_json(checkpoint / "trainer_state.json")
            if zipfile.is_zipfile(checkpoint / "rng_state.pth") or all(map(zipfile.is_zipfile, of_each)):
                return str(checkpoint)
        print(f"{checkpoint.name} was not finished, and is passed over.")
    return None


def training_log(trainer) -> pd.DataFrame:
    """step, loss, learning_rate, grad_norm, mean_token_accuracy, scale (fp16's) and eval_loss (of the validation rows).

    A row for every step at which something was logged, resumed ones too.
    """
    names = ["step", "loss", "learning_rate", "grad_norm", "mean_token_accuracy", "scale", "eval_loss"]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    log = pd.DataFrame(entries, columns=names).apply(pd.to_numeric, errors="coerce")
    return log.groupby("step", as_index=False).last()


def check_loss_mask(dataset, formatted: pd.DataFrame) -> str:
    """Compare what the trainer will count with what notebook 02 counted; returns both in words.

    `dataset` holds a sequence for each row or pack of rows, `formatted` each row's `tokens` and `counted`. Raises
    TrainingError where their sums differ: a backend that masks otherwise, or cuts rows, would train another objective.
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
        expected = f"02 formatted {wanted[0]} with {wanted[1]}: run 02 again, and check the pinned versions"
        raise TrainingError(f"The trainer holds {tokens} tokens with {counted} in the loss; {expected}.")
    return f"{len(dataset)} sequences hold {tokens:,} tokens, {counted:,} of them in the loss: exactly those of 02"


def save_adapter(model, tokenizer, run: StageRun, log: pd.DataFrame) -> None:
    """training/adapter (safetensors and tokenizer) and training/log.csv."""
    tokenizer.padding_side = "right"
    with atomic_folder(run.file("training/adapter")) as folder:
        model.save_pretrained(str(folder), safe_serialization=True)
        tokenizer.save_pretrained(str(folder))
        # peft keeps sets and writes them in the order of this process's hashes: the same adapter, but not the same file.
        path = folder / "adapter_config.json"
        settings = read_json(path)
        lists = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")
        ordered = {key: sorted(settings[key]) for key in lists if isinstance(settings.get(key), list)}
        write_json(path, settings | ordered)
    _save_log(log, run)


def _save_log(log: pd.DataFrame, run: StageRun) -> None:
    with atomic(run.file("training/log.csv")) as path:
        log.to_csv(path, index=False)


def _describe_model(model, config: Config) -> dict:
    """Backend, device, trainable parameters and fused layers: printed, and returned for the manifest."""
    backend, fused = resolve_hardware(config.hardware)["backend"], count_fused_layers(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"backend {backend}, {model.device}, {torch_dtype(config)}")
    print(f"{trainable:,} trainable parameters; fused layers: {fused or 'none (plain backend)'}")
    return {"backend": backend, "trainable_parameters": trainable} | {f"fused_{k}": n for k, n in (fused or {}).items()}
