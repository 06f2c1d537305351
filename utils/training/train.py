"""One process's training: fit, checkpoints to resume from, what to do when memory runs out, and what is left at the end."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from transformers.trainer_callback import PrinterCallback

from utils.errors import Interrupted, SessionOver, TrainingError
from utils.files import atomic, atomic_folder, digests, record_files, write_json, write_text
from utils.hardware import GIB, global_rank, peak_memory, resolve_hardware, world_size
from utils.models.load import count_fused_layers, torch_dtype, transformer_layers
from utils.models.memory import free_memory, is_out_of_memory
from utils.pipeline.signals import StopRequest
from utils.pipeline.stage import StageRun
from utils.pipeline.time_limit import Deadline
from utils.report.figures import draw_loss
from utils.report.tracking import Tracker
from utils.schema import Config
from utils.training.callbacks import (
    HealthCallback,
    ProgressCallback,
    SessionCallback,
    TrackingCallback,
)
from utils.training.checkpoints import SealCallback, find_checkpoint
from utils.training.fit import Fit
from utils.training.step_plan import Stopwatch, choose_fit, fall_back, let_go, recompute_as


class OutOfMemory(RuntimeError):
    """One of several processes ran out of memory: all of them have to start again, with the safer fit on file."""


def train_here(run: StageRun, load_with_lora: Callable, make_trainer: Callable) -> None:
    """Train in this process, one of `world_size()`; the first one leaves adapter, log, curve and training/summary.json.

    Goes on from the last checkpoint of the same rows and settings, and raises SessionOver, with a checkpoint saved, where
    the session's time is up before the work is done. Where memory runs out, a safer fit takes over from there: at once
    in a single process, by OutOfMemory for all where there are several.
    """
    rows = pd.read_parquet(run.file("data/formatted/train.parquet"))
    model, tokenizer = load_with_lora(run.config)
    figures = describe_model(model, run.config)
    fit = choose_fit(run, model, tokenizer, rows, make_trainer, world_size())
    tracker = Tracker(run, job_type="train") if global_rank() == 0 else None
    try:
        trainer, watch, fit = _train_to_the_end(run, model, tokenizer, rows, make_trainer, fit, tracker)
    except BaseException:
        if tracker is not None:
            tracker.finish()  # what was logged so far is worth keeping
        raise
    print(f"after: {memory_report()}")
    if world_size() > 1:
        leave_digest(run, model)
    if tracker is not None:
        log = training_log(trainer)
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run, log)
        _finish_tracking(tracker, run, log)
        figures |= {"steps": trainer.state.global_step, "processes": world_size(), **asdict(fit), **watch.figures(run)}
        last = float(log["loss"].tail(5).mean()) if len(log) else math.nan
        figures["final_loss"] = round(last, 4) if math.isfinite(last) else "none"
        summary = {"figures": figures, "peak_memory": peak_memory(), "update_seconds": watch.seconds()}
        write_json(run.file("training/summary.json"), summary)


def _train_to_the_end(run: StageRun, model, tokenizer, rows: pd.DataFrame, make_trainer, fit: Fit, tracker):
    """(trainer, stopwatch, fit) once the last update is done; raises SessionOver and OutOfMemory, see `train_here`."""
    config, folder = run.config, checkpoint_dir(run)
    trainable = [p for p in model.parameters() if p.requires_grad]
    first = [p.detach().to("cpu", copy=True) for p in trainable]
    while True:
        trainer = make_trainer(model, tokenizer, config, rows, fit, str(folder))
        print(check_loss_mask(trainer.train_dataset, rows))
        print(f"{fit}, {world_size()} process{'es' if world_size() > 1 else ''}; before: {memory_report()}")
        session = SessionCallback(Deadline.of(config.hardware.max_hours), StopRequest())
        watch = _listen(trainer, config, fit, tracker, session)
        null_run = config.train.max_steps == 0  # for testing the comparison: the adapter stays as it was initialised
        with session.stop:
            done = null_run or _train(trainer, find_checkpoint(folder))
        if done:
            break
        instead = fall_back(run, fit, len(transformer_layers(model)))
        last = find_checkpoint(folder)
        told = f"Out of memory with {fit}; going on from {Path(last).name if last else 'the start'} with {instead}."
        if world_size() > 1:
            raise OutOfMemory(told)
        print(told)
        let_go(trainer)
        del trainer, watch
        free_memory(model)
        if last is None:
            with torch.no_grad():
                for parameter, value in zip(trainable, first, strict=True):
                    parameter.copy_(value)
        fit = instead
    if session.ended:
        if global_rank() == 0:
            save_log(training_log(trainer), run)  # for whoever looks at the session's end
        stopped = f"Training stopped at step {trainer.state.global_step} of {trainer.state.max_steps} with a checkpoint"
        if session.ended == "asked":
            raise Interrupted(f"{stopped}, because it was asked to; run 03 again, it goes on from there.")
        raise SessionOver(
            f"{stopped}, because {session.deadline.sentence()}; run 03 again in the next session, it goes on from there."
        )
    return trainer, watch, fit


def describe_model(model, config: Config) -> dict:
    """Backend, device, trainable parameters and fused layers: printed, and returned for the manifest."""
    backend = resolve_hardware(config.hardware)["backend"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fused = count_fused_layers(model)
    print(f"backend {backend}, {model.device}, {torch_dtype(config)}")
    print(f"{trainable:,} trainable parameters; fused layers: {fused or 'none (plain backend)'}")
    figures = {"backend": backend, "trainable_parameters": trainable}
    return figures | {f"fused_{name}": count for name, count in (fused or {}).items()}


def _name_the_cpu(trainer) -> None:
    """accelerate calls a CPU that several processes share cpu:0, to which torch cannot load a checkpoint's optimizer.

    transformers 5.17 asks for just that. To be retired when it loads to where the optimizer's state is.
    """
    if trainer.args.device.type == "cpu":
        trainer.args.__dict__["_setup_devices"] = torch.device("cpu")


def _listen(trainer, config: Config, fit: Fit, tracker: Tracker | None, session: SessionCallback) -> Stopwatch:
    _name_the_cpu(trainer)
    trainer.remove_callback(PrinterCallback)  # the bar shows what it would print
    trainer.add_callback(HealthCallback(trainer.accelerator.scaler))
    trainer.add_callback(session)
    trainer.add_callback(SealCallback())
    if tracker is not None:
        trainer.add_callback(ProgressCallback())
        trainer.add_callback(TrackingCallback(tracker))
    recompute_as(trainer, config, fit)
    return Stopwatch(trainer)


def _train(trainer, checkpoint: str | None) -> bool:
    """Whether it came to its end; False where memory ran out."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:  # after an error the trainer does not say that it ended
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.close()
    return True


def _finish_tracking(tracker: Tracker, run: StageRun, log: pd.DataFrame) -> None:
    tracker.image("loss", draw_loss(log, run.file("training/loss.png")))
    tracker.image("lengths", run.file("data/lengths.png"))
    tracker.finish()


def checkpoint_dir(run: StageRun) -> Path:
    """Where this run's checkpoints go: a folder named by what they rest on, so that no other run's are resumed."""
    inputs = digests(record_files(run.path, run.stage.inputs))
    basis = json.dumps([run.settings(run.stage), run.record(run.stage)["computed_on"], inputs], sort_keys=True)
    return run.file("training/checkpoints") / hashlib.sha256(basis.encode()).hexdigest()[:12]


def training_log(trainer) -> pd.DataFrame:
    """step, loss, learning_rate, grad_norm, mean_token_accuracy, scale (fp16's) for every logged step, resumed ones too."""
    names = ["step", "loss", "learning_rate", "grad_norm", "mean_token_accuracy", "scale"]
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


def leave_digest(run: StageRun, model) -> None:
    """training/process-RANK.sha256: this process's trained weights in one line, for the launcher to compare."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    write_text(run.file(f"training/process-{global_rank()}.sha256"), digest.hexdigest())


def save_adapter(model, tokenizer, run: StageRun, log: pd.DataFrame) -> None:
    """training/adapter (safetensors and tokenizer) and training/log.csv."""
    tokenizer.padding_side = "right"
    with atomic_folder(run.file("training/adapter")) as folder:
        model.save_pretrained(str(folder), safe_serialization=True)
        tokenizer.save_pretrained(str(folder))
        _sort_modules(folder / "adapter_config.json")
    save_log(log, run)


def _sort_modules(path: Path) -> None:
    """peft keeps a set and writes it in the order of this process's hashes: the same adapter would not be the same file."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        if isinstance(settings.get(key), list):
            settings[key] = sorted(settings[key])
    write_json(path, settings)


def save_log(log: pd.DataFrame, run: StageRun) -> None:
    """training/log.csv."""
    with atomic(run.file("training/log.csv")) as path:
        log.to_csv(path, index=False)


def memory_report() -> str:
    """Memory of this process in one line, before and after training."""
    parts = [f"process {peak_memory()['rss_gib']:.2f} GiB at its peak"]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory / GIB
        reserved = torch.cuda.max_memory_reserved() / GIB
        parts.append(f"{name}: {reserved:.2f} of {total:.1f} GiB reserved at the peak")
    return ", ".join(parts)
