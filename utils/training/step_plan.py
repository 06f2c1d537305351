"""Short trials of training steps: how fast a fit is on this GPU, and how much memory it takes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime

import pandas as pd
import torch
from transformers import TrainerCallback

from utils.errors import OutOfMemory
from utils.hardware import GIB, global_rank, gpus, installed, resolve_hardware, world_size
from utils.models.load import transformer_layers
from utils.models.memory import free_bytes, free_memory, is_out_of_memory
from utils.pipeline.stage import StageRun
from utils.schema import Config
from utils.sealed import read_sealed, write_sealed
from utils.training.callbacks import RecomputeCallback
from utils.training.fit import DoesNotFit, Fit, Measured, safer, search

FILE = "training/fit.json"
_UPDATES = 3  # of one trial; the first warms up, of the others the faster one counts
_SPARE_GIB = 0.25  # packs differ in how many documents they hold, and so a little in memory: a trial knows one kind


class Stopwatch(TrainerCallback):
    """When each update ended (seconds, GPU work included) and how many tokens it held, padding not counted."""

    def __init__(self, trainer):
        self.ends: list[float] = []
        self.tokens: list[int] = []
        take = trainer.get_batch_samples

        def counted(*arguments, **keywords):
            batches, items = take(*arguments, **keywords)
            self.tokens.append(sum(_count_tokens(batch) for batch in batches))
            return batches, items

        trainer.get_batch_samples = counted
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **_):
        _wait_for_gpu()
        self.ends.append(time.monotonic())

    def figures(self, run: StageRun) -> dict[str, float]:
        """Seconds from the stage's start to the first update's end, and the median tokens per second of this process."""
        if not self.ends:
            return {}
        began = datetime.fromisoformat(run.record(run.stage)["started"]).timestamp()
        found = {"seconds_to_first_update": round(time.time() - (time.monotonic() - self.ends[0]) - began, 1)}
        if self.speeds():
            found["tokens_per_second"] = round(statistics.median(self.speeds()))
            found["seconds_per_update"] = round(statistics.median(self.seconds()), 4)
        return found

    def seconds(self) -> list[float]:
        """How long each update after the first took."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]

    def speeds(self) -> list[float]:
        """Tokens per second of each update after the first."""
        return [tokens / s for tokens, s in zip(self.tokens[1:], self.seconds(), strict=False)]


class TrialWatch(Stopwatch):
    """A stopwatch that also times each update's second micro-batch; for short runs, since the GPU is waited for."""

    def __init__(self, trainer):
        super().__init__(trainer)
        self.seconds_of_second: list[float] = []  # one for each update that has a second micro-batch
        self._first_ended: float | None = None

    def on_substep_end(self, args, state, control, **_):
        _wait_for_gpu()
        self._first_ended = time.monotonic()

    def on_pre_optimizer_step(self, args, state, control, **_):
        if self._first_ended is not None:
            _wait_for_gpu()
            self.seconds_of_second.append(time.monotonic() - self._first_ended)

    def speed_of(self, accumulate: int, tried: int) -> float:
        """Tokens per second of an update of `accumulate` micro-batches, from the fastest update of `tried` (one or two).

        What comes once in an update (the optimizer's step, logging) would count too often in one that is cut short.
        """
        seconds, tokens = min(self.seconds()), self.tokens[-1] / tried
        if accumulate > tried:
            seconds += (accumulate - tried) * min(self.seconds_of_second[1:])
        return accumulate * tokens / seconds


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _count_tokens(batch: dict) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def rows_per_update(config: Config, packed: bool, mean_tokens: float) -> int:
    """How many rows, or packs where the trainer packs, go into one update over all GPUs.

    Where packing is wanted and the backend cannot pack, as many rows as the packs would hold.
    """
    rows = config.train.rows_per_update
    if config.train.packing and not packed:
        rows *= max(1, round(config.model.max_seq_length / mean_tokens))
    return rows


def given_fit(config: Config, rows: int, layers: int) -> Fit:
    """The configured micro-batch, or the largest below it that divides this process's `rows` of an update."""
    micro = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= config.train.per_device_train_batch_size)
    return Fit(micro, rows // micro, layers if config.train.gradient_checkpointing else 0)


def choose_fit(run: StageRun, model, tokenizer, rows: pd.DataFrame, make_trainer: Callable, world: int = 1) -> Fit:
    """The fit of this run for each of `world` processes: on file, found by trials on this GPU, or as configured.

    It is kept in training/fit.json and found again there while settings, rows and GPU are the same. The LoRA weights
    are left as they were. Trials need a process that is alone. Raises OutOfMemory where not even a single row fits.
    """
    known = fit_on_file(run, rows, world) if world_size() == 1 else _as_launched(run, world)
    if known is not None:
        return known
    config = run.config
    packed = config.train.packing and resolve_hardware(config.hardware)["backend"] == "unsloth"
    share = rows_per_update(config, packed, float(rows["tokens"].mean())) // world
    layers = len(transformer_layers(model))
    fit, trials = given_fit(config, share, layers), []
    if wants_trials(config) and world_size() == 1:
        fastest, trials = _search(model, tokenizer, config, rows, packed, make_trainer, share, layers, world)
        if fastest is None:
            raise OutOfMemory("A single training row does not fit into GPU memory; lower model.max_seq_length.")
        fit = fastest
    if global_rank() == 0:
        shown = {"trials": [asdict(t) for t in trials], "basis": _basis(run, rows, world)}
        write_sealed(run.file(FILE), {"fit": asdict(fit), "world": world, **shown})
    return fit


def _as_launched(run: StageRun, world: int) -> Fit | None:
    """The fit that the launcher left, whatever this process's own GPU is: all have to cut an update alike."""
    known = _read(run)
    return Fit(**known["fit"]) if known.get("world") == world else None


def _read(run: StageRun) -> dict:
    """What training/fit.json holds; nothing where there is none that is whole."""
    return read_sealed(run.file(FILE))


def _leaves_fit_open(config: Config) -> bool:
    return config.train.fit == "auto" and config.train.gradient_checkpointing


def recompute_as(trainer, config: Config, fit: Fit) -> None:
    """Let the trainer's model recompute the layers that `fit` says, where fits are found by trials."""
    if _leaves_fit_open(config):
        trainer.add_callback(RecomputeCallback(fit.recompute_layers))


def wants_trials(config: Config) -> bool:
    """Whether the configuration leaves the fit to trials, and there is a GPU to try it on."""
    return _leaves_fit_open(config) and resolve_hardware(config.hardware)["device"] == "cuda"


def fit_on_file(run: StageRun, rows: pd.DataFrame, world: int) -> Fit | None:
    """What training/fit.json holds for these settings, rows, GPU and number of processes."""
    known = _read(run)
    return Fit(**known["fit"]) if known.get("basis") == _basis(run, rows, world) else None


def fall_back(run: StageRun, fit: Fit, layers: int) -> Fit:
    """Put a safer fit than `fit`, which ran out of memory, on file and return it; raises OutOfMemory at the end."""
    known = _read(run)
    if known and Fit(**known["fit"]) != fit:  # another process was here first
        return Fit(**known["fit"])
    instead = safer(fit, layers if run.config.train.gradient_checkpointing else fit.recompute_layers)
    if instead is None:
        raise OutOfMemory(
            f"Training ran out of GPU memory even with {fit}; lower model.max_seq_length, or free the GPU."
        )
    given_up = [*known.get("ran_out_of_memory", []), asdict(fit)]
    write_sealed(run.file(FILE), {**known, "fit": asdict(instead), "ran_out_of_memory": given_up})
    return instead


def _search(model, tokenizer, config, rows, packed, make_trainer, share, layers, world):
    trainable = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().to("cpu", copy=True) for p in trainable]
    longest = _longest_rows(rows, packed, config.model.max_seq_length)
    held = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0
    room = (free_bytes(model.device) + held) / GIB - _SPARE_GIB
    if world > 1:  # the buckets in which gradients travel between processes
        room -= sum(p.numel() * p.element_size() for p in trainable) / GIB
    print(f"trials of {_UPDATES} updates, {room:.1f} GiB to be had:")

    def measure(fit: Fit) -> Measured:
        try:
            measured = run_trial(model, tokenizer, config, longest, make_trainer, fit)
        finally:
            with torch.no_grad():
                for parameter, before in zip(trainable, kept, strict=True):
                    parameter.copy_(before)
        print(f"  {fit}: {measured.tokens_per_second:,.0f} tokens/s, {measured.peak_gib:.1f} GiB")
        return measured

    return search(measure, share, layers, room)


def run_trial(model, tokenizer, config, rows: pd.DataFrame, make_trainer: Callable, fit: Fit) -> Measured:
    """A few updates on `rows` (repeated as needed) with at most two micro-batches each; raises DoesNotFit.

    Two, since gradients of the first are held while the second is computed.
    """
    accumulate = min(2, fit.gradient_accumulation_steps)
    count = fit.per_device_train_batch_size * accumulate * _UPDATES
    few = pd.concat([rows] * -(-count // len(rows)), ignore_index=True).head(count)
    fitted, failed = replace(fit, gradient_accumulation_steps=accumulate), False
    trainer = watch = None
    free_memory()
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        try:
            trainer = make_trainer(model, tokenizer, config, few, fitted, scratch)
            trainer.args.max_steps, trainer.args.save_strategy = _UPDATES, "no"
            trainer.add_callback(RecomputeCallback(fit.recompute_layers))
            watch = TrialWatch(trainer)
            trainer.train()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = True
    if trainer is not None:
        let_go(trainer)
    if failed:  # outside the handler, whose traceback would keep the tensors alive
        del trainer, watch
        free_memory(model)
        raise DoesNotFit(str(fit))
    peak = torch.cuda.max_memory_allocated(model.device) / GIB if on_gpu else 0.0
    speed = watch.speed_of(fit.gradient_accumulation_steps, accumulate)
    return Measured(fit, round(speed, 1), round(peak, 2))


def let_go(trainer) -> None:
    """Take a trainer's hands off its model, so that another one can train it: gradients, autocast wrapper, optimizer."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.zero_grad(set_to_none=True)
    trainer.accelerator.free_memory()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model_wrapped = trainer.model


def _longest_rows(rows: pd.DataFrame, packed: bool, max_length: int) -> pd.DataFrame:
    """The row that takes most memory: the longest one, or one that fills a whole pack (the trainer cuts it there)."""
    longest = rows.sort_values("tokens").tail(1)[["prompt", "completion"]]
    if not packed:
        return longest
    times = -(-max_length // int(rows["tokens"].max())) + 1
    return longest.assign(completion=longest["completion"] * times)


def _basis(run: StageRun, rows: pd.DataFrame, world: int) -> str:
    """A digest of what a fit rests on; no GPU is touched for it."""
    versions = {name: installed(name) for name in ("torch", "unsloth", "transformers", "trl", "peft", "bitsandbytes")}
    lengths = (len(rows), int(rows["tokens"].max()), int(rows["tokens"].sum()))
    sections = run.config.sections(
        "model", "lora", "train", "hardware.backend", "hardware.dtype", "hardware.emulate_t4"
    )
    cards = [(gpu.name, gpu.memory_gib) for gpu in gpus()[:1]]
    return hashlib.sha256(json.dumps([sections, lengths, world, cards, versions], sort_keys=True).encode()).hexdigest()
