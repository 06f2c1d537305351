"""The step plan: how an update is cut into micro-batches, and how many layers compute their activations again.

It decides speed and memory, never what is learnt: every plan takes the same rows into the same update.
"""

import contextlib
import gc
import io
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import pandas as pd
import torch

from utils.errors import OutOfMemory
from utils.files import read_json, write_json
from utils.hardware import GIB, global_rank, gpus, resolve_hardware, world_size
from utils.models.load import transformer_layers
from utils.models.memory import free_bytes, free_memory, is_out_of_memory
from utils.pipeline.stage import StageRun
from utils.schema import Config
from utils.training.callbacks import RecomputeCallback, Stopwatch

FILE = "training/step_plan.json"
_UPDATES = 3  # of one trial; the first warms up, of the others the faster one counts
_LEAST_UPDATES = 24  # a shorter training is over before trials of all micro-batches would be
_FIXED = 0.25  # at most this share of the free memory does not grow with rows and layers: the loss, the optimizer
_SPARE_GIB = 0.25  # packs differ in how many documents they hold, and so a little in memory: a trial knows one kind
# Of a trial: tokens per second, and the share of the free memory that it took; None where that was not enough
Measured = tuple[float, float] | None


@dataclass(frozen=True)
class StepPlan:
    """One way to compute an update on each GPU; the first `recompute_layers` layers do not keep their activations."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    recompute_layers: int

    def __str__(self) -> str:
        cut = f"{self.per_device_train_batch_size} x {self.gradient_accumulation_steps}"
        return f"micro-batch {cut}, {self.recompute_layers} layers recompute"


def search(measure: Callable[[StepPlan], Measured], rows: int, layers: int) -> list[tuple[float, StepPlan]]:
    """(tokens per second, plan) for each micro-batch of an update of `rows` rows, the fastest first; none where none fits.

    Each recomputes as few layers as fit, in steps of an eighth; where so many rows times kept layers did not fit, or would
    not by what a smaller micro-batch took, no plan with as many is tried.
    """
    trials: list[tuple[float, StepPlan]] = []
    counts, too_many = [*range(0, layers, max(1, layers // 8)), layers], math.inf
    for micro in _divisors(rows):
        counts = [count for count in counts if micro * (layers - count) < too_many]
        while counts and (found := measure(plan := StepPlan(micro, rows // micro, counts[0]))) is None:
            too_many = micro * (layers - counts.pop(0))
        if not counts:
            break
        speed, taken = found
        trials.insert(0, (speed, plan))
        if len(trials) > 1 and speed <= trials[1][0]:  # larger ones would be slower still
            break
        if (kept := micro * (layers - plan.recompute_layers)) and taken > _FIXED:
            too_many = min(too_many, kept * (1 - _FIXED) / (taken - _FIXED))
    return sorted(trials, key=lambda one: -one[0])


def _divisors(rows: int) -> list[int]:
    return [n for n in range(1, rows + 1) if rows % n == 0]


def smaller_plan(plan: StepPlan, layers: int) -> StepPlan:
    """What to resume with after `plan` ran out of memory: more layers recompute, then smaller micro-batches.

    Raises OutOfMemory where nothing is smaller.
    """
    if plan.recompute_layers < layers:
        return replace(plan, recompute_layers=min(layers, plan.recompute_layers + max(1, layers // 4)))
    micro, rows = plan.per_device_train_batch_size, plan.per_device_train_batch_size * plan.gradient_accumulation_steps
    if micro == 1:
        raise OutOfMemory(f"Training ran out of memory even with {plan}; lower model.max_seq_length, or free the GPU.")
    smaller = max(n for n in _divisors(rows) if n < micro)
    return StepPlan(smaller, rows // smaller, layers)


def choose_plan(run: StageRun, model, tokenizer, rows: pd.DataFrame, make_trainer, world: int = 1) -> StepPlan:
    """The plan for each of `world` processes: on file, found by trials (a single process's), or as configured.

    Raises OutOfMemory where not even a single row fits.
    """
    if known := plan_on_file(run, rows, world):
        return known
    train, layers, share = run.config.train, len(transformer_layers(model)), rows_per_update(run.config, rows) // world
    micro = max(n for n in _divisors(share) if n <= train.per_device_train_batch_size)
    plan, trials = StepPlan(micro, share // micro, layers if train.gradient_checkpointing else 0), []
    if wants_trials(run.config, rows) and world_size() == 1:
        trials = try_plans(model, tokenizer, run.config, rows, make_trainer, share)
        if not trials:
            raise OutOfMemory("A single training row does not fit into GPU memory; lower model.max_seq_length.")
        plan = trials[0][1]
    if global_rank() == 0:
        tried = [{"step_plan": asdict(one), "tokens_per_second": speed} for speed, one in trials]
        write_json(run.file(FILE), {"step_plan": asdict(plan), "trials": tried, "for": _conditions(run, rows, world)})
    return plan


def plan_on_file(run: StageRun, rows: pd.DataFrame, world: int) -> StepPlan | None:
    """What training/step_plan.json holds for these settings, rows, GPU, and number of processes."""
    now = _conditions(run, rows, world)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        known = read_json(run.file(FILE))
        if world_size() > 1:  # all of them cut an update alike, or would wait for each other, whatever their own GPU is
            now["gpu"] = known["for"]["gpu"]
        return StepPlan(**known["step_plan"]) if known["for"] == now else None
    return None


def _conditions(run: StageRun, rows: pd.DataFrame, world: int) -> dict:
    decisive = ("model", "lora", "train", "hardware.backend", "hardware.dtype", "hardware.emulate_t4")
    settings = run.config.sections(*decisive)
    lengths = [len(rows), int(rows["tokens"].sum()), int(rows["tokens"].max())]
    return {"processes": world, "gpu": str(gpus()[:1]), "lengths": lengths, "settings": settings}


def rows_per_update(config: Config, rows: pd.DataFrame) -> int:
    """Rows, or packs, of one update over all GPUs; where the backend cannot pack, as many rows as the packs would hold."""
    count = config.train.rows_per_update
    if config.train.packing and resolve_hardware(config.hardware)["backend"] != "unsloth":
        count *= max(1, round(config.model.max_seq_length / rows["tokens"].mean()))
    return count


def wants_trials(config: Config, rows: pd.DataFrame) -> bool:
    """Whether to try plans: they are left open, there is a GPU, and the training has more updates than the trials."""
    train = config.train
    updates = train.max_steps
    if updates is None:
        size = config.model.max_seq_length if train.packing else rows["tokens"].mean()
        updates = train.num_train_epochs * rows["tokens"].sum() / size / train.rows_per_update
    is_open = train.step_plan == "auto" and train.gradient_checkpointing and updates >= _LEAST_UPDATES
    return is_open and resolve_hardware(config.hardware)["device"] == "cuda"


def try_plans(model, tokenizer, config, rows: pd.DataFrame, make_trainer: Callable, share: int) -> list[tuple]:
    """Search on this GPU, on the row that takes most memory; the LoRA weights are left as they were."""
    weights, longest = trainable_weights(model), rows.sort_values("tokens").tail(1)[["prompt", "completion"]]
    if config.train.packing:  # one that fills a whole pack; the trainer cuts it there
        times = config.model.max_seq_length // int(rows["tokens"].max()) + 2
        longest = longest.assign(completion=longest["completion"] * times)

    def measure(plan: StepPlan) -> Measured:
        found = run_trial(model, tokenizer, config, longest, make_trainer, plan)
        model.load_state_dict(weights, strict=False)
        print(f"  {plan}: {'does not fit' if found is None else f'{found[0]:,.0f} tokens/s'}")
        return found

    print(f"trials of {_UPDATES} updates:")
    gc.collect()
    gc.freeze()  # a trial has the garbage collected several times, and each takes half a second with the model's objects
    try:
        return search(measure, share, len(transformer_layers(model)))
    finally:
        gc.unfreeze()


def run_trial(model, tokenizer, config, row: pd.DataFrame, make_trainer: Callable, plan: StepPlan) -> Measured:
    """Tokens per second of a few updates by `plan` on copies of `row`, and their share of the free memory; None: no room."""
    # Two micro-batches tell: gradients are held while the second is computed, as in all after it.
    plan = replace(plan, gradient_accumulation_steps=min(2, plan.gradient_accumulation_steps))
    count = plan.per_device_train_batch_size * plan.gradient_accumulation_steps * _UPDATES
    rows, found = pd.concat([row] * count, ignore_index=True), None
    free_memory(model)
    held, room = torch.cuda.memory_allocated(), free_bytes(model.device) - _SPARE_GIB * GIB
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(model, tokenizer, config, rows, plan, scratch)
        trainer.args.max_steps, trainer.args.save_strategy = _UPDATES, "no"
        trainer.add_callback(RecomputeCallback(plan.recompute_layers))
        watch = Stopwatch(trainer)
        if train_if_it_fits(trainer) and (taken := torch.cuda.max_memory_allocated() - held) <= room:
            found = max(n / s for n, s in zip(watch.tokens[1:], watch.seconds(), strict=False)), taken / room
    release_trainer(trainer)
    del trainer, watch
    free_memory(model)
    return found


def train_if_it_fits(trainer, checkpoint: str | None = None) -> bool:
    """Train, from `checkpoint` where one is given; False where memory ran out, and whatever else is wrong is raised."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False  # to be released by the caller: here the traceback keeps the tensors alive


def recompute_as(trainer, config: Config, plan: StepPlan) -> None:
    """Let the trainer's model recompute the layers that `plan` says, where plans are found by trials."""
    if config.train.step_plan == "auto":
        trainer.add_callback(RecomputeCallback(plan.recompute_layers))


def trainable_weights(model) -> dict[str, torch.Tensor]:
    """A copy of what is trained, in main memory, for the model's load_state_dict."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


def release_trainer(trainer) -> None:
    """Free a trainer's model, so that another one can train it: of gradients, autocast wrapper, optimizer."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.zero_grad(set_to_none=True)
    trainer.accelerator.free_memory()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model_wrapped = trainer.model
