"""Step plans: the search finds what fits and is fast, leaves the model as it was, and is not begun where it cannot pay."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.recipe import notebook_functions
from utils.config import load_config
from utils.errors import OutOfMemory
from utils.hardware import GIB
from utils.training import step_plan
from utils.training.step_plan import (
    StepPlan,
    choose_plan,
    plan_on_file,
    release_trainer,
    rows_per_update,
    run_trial,
    search,
    smaller_plan,
    trainable_weights,
    wants_trials,
)

LOAD, MAKE = notebook_functions()
LAYERS = 32


class Gpu:
    """Memory is linear in kept layers and micro-batch, but for a `share` of what is free; a layer that recomputes costs
    half as much again."""

    def __init__(self, gib: float, overhead_s: float, fixed: float = 0.5, each: float = 0.2, share: float = 0.0):
        self.gib, self.overhead_s, self.base = gib, overhead_s, 7.0
        self.fixed, self.each, self.share = fixed, each, share

    def peak(self, plan: StepPlan) -> float:
        kept = LAYERS - plan.recompute_layers
        rows = plan.per_device_train_batch_size * (self.fixed + self.each * kept)
        return self.base + self.share * (self.gib - self.base) + rows

    def speed(self, plan: StepPlan) -> float:
        work = 1 + 0.5 * plan.recompute_layers / LAYERS
        return 1 / (work + self.overhead_s / plan.per_device_train_batch_size)

    def measure(self, plan: StepPlan) -> tuple[float, float] | None:
        taken = (self.peak(plan) - self.base) / (self.gib - self.base) if self.gib > self.base else 2.0
        return (self.speed(plan), taken) if taken <= 1 else None


def fastest(gpu: Gpu, rows: int) -> float:
    plans = [StepPlan(m, rows // m, r) for m in range(1, rows + 1) if rows % m == 0 for r in range(LAYERS + 1)]
    return max(gpu.speed(plan) for plan in plans if gpu.peak(plan) <= gpu.gib)


@pytest.mark.parametrize(("overhead_s", "micro"), [(0.01, 1), (3.0, 4)])
def test_small_micro_batches_win_where_launches_cost_little_and_large_ones_where_they_cost_much(overhead_s, micro):
    gpu = Gpu(gib=13.25, overhead_s=overhead_s)
    trials = search(gpu.measure, 4, LAYERS)
    assert trials[0][1].per_device_train_batch_size == micro
    assert gpu.speed(trials[0][1]) >= 0.94 * fastest(gpu, 4)
    assert len(trials) == (2 if micro == 1 else 3)  # a larger micro-batch that is slower ends the search


@pytest.mark.parametrize(
    ("gib", "plans"),
    [
        (13.25, [(1, 0), (1, 4), (2, 20), (4, 28)]),
        (14.0, [(1, 0), (2, 16), (2, 20), (4, 28)]),  # the first one took nearly all, so twice its layers cannot fit
        (34.0, [(1, 0), (2, 0), (4, 0), (4, 4)]),
        (99.0, [(1, 0), (2, 0), (4, 0)]),
    ],
)
def test_no_plan_is_tried_that_cannot_fit_by_what_others_took(gib, plans):
    gpu, tried = Gpu(gib=gib, overhead_s=3.0), []

    def measure(plan: StepPlan) -> tuple[float, float] | None:
        tried.append((plan.per_device_train_batch_size, plan.recompute_layers))
        return gpu.measure(plan)

    search(measure, 4, LAYERS)
    assert tried == plans


@given(
    gib=st.floats(7.1, 40.0),
    overhead=st.floats(0.0, 5.0),
    each=st.floats(0.0, 1.0),
    fixed=st.floats(0.0, 1.0),
    share=st.floats(0.0, 0.24),
    rows=st.integers(1, 24),
)
def test_whatever_the_gpu_the_choice_takes_every_row_and_recomputes_as_little_as_fits(
    gib, overhead, each, fixed, share, rows
):
    gpu = Gpu(gib, overhead, fixed, each, share)
    trials = search(gpu.measure, rows, LAYERS)
    if not trials:
        assert gpu.peak(StepPlan(1, rows, LAYERS)) > gib
        return
    plan = trials[0][1]
    assert plan.per_device_train_batch_size * plan.gradient_accumulation_steps == rows
    assert gpu.speed(plan) == max(speed for speed, _ in trials)
    for _, plan in trials:
        assert gpu.measure(plan) and 0 <= plan.recompute_layers <= LAYERS
        less = replace(plan, recompute_layers=plan.recompute_layers - LAYERS // 8)
        assert plan.recompute_layers == 0 or gpu.measure(less) is None


@pytest.mark.parametrize("start", [StepPlan(4, 3, 0), StepPlan(12, 1, 32), StepPlan(1, 1, 5), StepPlan(7, 1, 0)])
def test_falling_back_ends_and_takes_every_row_and_less_memory_each_time(start):
    gpu, plan, steps = Gpu(gib=99, overhead_s=1), start, 0
    while plan.per_device_train_batch_size > 1 or plan.recompute_layers < LAYERS:
        smaller = smaller_plan(plan, LAYERS)
        assert gpu.peak(smaller) < gpu.peak(plan)
        rows = smaller.per_device_train_batch_size * smaller.gradient_accumulation_steps
        assert rows == start.per_device_train_batch_size * start.gradient_accumulation_steps
        plan, steps = smaller, steps + 1
        assert steps < 20
    with pytest.raises(OutOfMemory, match="even with micro-batch 1 x"):
        smaller_plan(plan, LAYERS)


@pytest.fixture
def loaded(training_run):
    run = training_run(train__gradient_checkpointing=True)
    model, tokenizer = LOAD(run.config)
    return run, model, tokenizer, pd.read_parquet(run.file("data/formatted/train.parquet"))


def test_a_trial_measures_speed_and_a_search_leaves_the_weights_as_they_were(loaded, capsys):
    run, model, tokenizer, rows = loaded
    before = trainable_weights(model)
    speed, taken = run_trial(model, tokenizer, run.config, rows.head(1), MAKE, StepPlan(2, 2, 1))
    assert speed > 0 and taken == 0  # nothing of a GPU's
    after = trainable_weights(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)  # it did train
    model.load_state_dict(before, strict=False)
    trials = step_plan.try_plans(model, tokenizer, run.config, rows, MAKE, 4)
    after = trainable_weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    plan = trials[0][1]
    assert plan.per_device_train_batch_size * plan.gradient_accumulation_steps == 4 and len(trials) >= 2
    assert "tokens/s" in capsys.readouterr().out
    assert gc.get_freeze_count() == 0


def test_a_trials_share_of_memory_is_of_what_was_free_before_it(loaded, monkeypatch):
    run, model, tokenizer, rows = loaded
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 6 * GIB)
    monkeypatch.setattr(step_plan, "free_bytes", lambda _: 8.25 * GIB)
    for peak, share in ((10, 0.5), (14, 1.0), (14.1, None)):
        monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda peak=peak: peak * GIB)
        found = run_trial(model, tokenizer, run.config, rows.head(1), MAKE, StepPlan(1, 1, 0))
        assert (found and found[1]) == share


def test_no_trial_has_to_look_through_what_the_model_left_in_memory(loaded, monkeypatch):
    run, model, tokenizer, rows = loaded
    set_aside = []

    def trial(*_):
        set_aside.append(gc.get_freeze_count())
        raise KeyboardInterrupt

    monkeypatch.setattr(step_plan, "run_trial", trial)
    with pytest.raises(KeyboardInterrupt):
        step_plan.try_plans(model, tokenizer, run.config, rows, MAKE, 4)
    assert set_aside[0] > 10_000 and gc.get_freeze_count() == 0


def test_running_out_of_memory_in_a_trial_is_an_answer_and_any_other_error_is_not(loaded):
    run, model, tokenizer, rows = loaded

    def failing(message):
        def make(*arguments):
            trainer = MAKE(*arguments)
            trainer.training_step = lambda *_: (_ for _ in ()).throw(RuntimeError(message))
            return trainer

        return make

    no_memory = failing("CUDA out of memory. Tried to allocate")
    assert run_trial(model, tokenizer, run.config, rows, no_memory, StepPlan(1, 1, 0)) is None
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_trial(model, tokenizer, run.config, rows, failing("device-side assert"), StepPlan(1, 1, 0))


def test_a_released_trainer_leaves_nothing_on_the_model(loaded, tmp_path):
    run, model, tokenizer, rows = loaded
    forward = model.forward
    for _ in range(2):
        trainer = MAKE(model, tokenizer, run.config, rows, StepPlan(4, 1, 0), str(tmp_path))
        trainer.args.max_steps = 1
        trainer.train()
        release_trainer(trainer)
    assert model.forward == forward and trainer.optimizer is None
    assert all(p.grad is None for p in model.parameters())


def rows_of(count: int, tokens: int) -> pd.DataFrame:
    return pd.DataFrame({"tokens": [tokens] * count})


def test_as_many_rows_go_into_an_update_whether_the_backend_packs_or_not():
    packing = load_config("t4", {"hardware.backend": "unsloth"})
    padding = load_config("t4", {"hardware.backend": "transformers"})
    assert rows_per_update(packing, rows_of(1, 684)) == 4
    assert rows_per_update(padding, rows_of(1, 684)) == 12
    assert rows_per_update(padding, rows_of(1, 5000)) == 4
    assert rows_per_update(load_config("tutorial"), rows_of(1, 684)) == 8


def test_nothing_is_tried_where_the_whole_training_is_shorter_than_the_trials():
    def wanted(count: int, **settings) -> bool:
        changed = {"hardware.backend": "unsloth", **{key.replace("__", "."): value for key, value in settings.items()}}
        return wants_trials(load_config("t4", changed), rows_of(count, 684))

    assert wanted(4000) and wanted(12 * 25) and not wanted(12 * 23)  # an update is four packs, twelve rows
    assert wanted(100, train__num_train_epochs=3) and not wanted(4000, train__max_steps=23)
    assert not wanted(4000, train__max_steps=0)  # a null run
    assert not wanted(4000, train__step_plan="given") and not wanted(4000, train__gradient_checkpointing=False)
    assert not wanted(4000, hardware__device="cpu")


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 2), (8, 1)])
def test_without_trials_the_plan_is_the_profiles_or_what_divides_a_processs_share(loaded, world, micro):
    run, model, tokenizer, rows = loaded
    run.config = load_config(
        "demo", {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4, "train.gradient_checkpointing": True}
    )  # fmt: skip
    plan = choose_plan(run, model, tokenizer, rows, MAKE, world)
    assert plan == StepPlan(micro, 8 // world // micro, 2)


def test_a_plan_is_kept_and_found_again_until_what_it_is_for_changes(loaded, monkeypatch):
    run, model, tokenizer, rows = loaded
    monkeypatch.setattr(step_plan, "wants_trials", lambda *_: True)
    searched = []

    def try_plans(*_):
        searched.append(1)
        return [(10.0, StepPlan(2, 2, 1))]

    monkeypatch.setattr(step_plan, "try_plans", try_plans)
    plans = [choose_plan(run, model, tokenizer, rows, MAKE) for _ in range(2)]
    assert plans == [StepPlan(2, 2, 1)] * 2 and len(searched) == 1
    assert plan_on_file(run, rows, 2) is None  # for two processes it says nothing
    assert plan_on_file(run, rows.head(9), 1) is None
    monkeypatch.setattr(step_plan, "gpus", lambda: (SimpleNamespace(name="Tesla T4", memory_gib=15.0),))
    assert plan_on_file(run, rows, 1) is None  # nor on another GPU
    monkeypatch.setenv("WORLD_SIZE", "2")  # launched processes take it all the same: they have to cut an update alike
    assert plan_on_file(run, rows, 1) == StepPlan(2, 2, 1)


@pytest.mark.parametrize("world", ["1", "2"])
@pytest.mark.parametrize("damage", ["cut", "{}", "[]", "null", "no plan", "no for", "another key", "a list"])
def test_a_damaged_plan_is_no_plan(loaded, monkeypatch, damage, world):
    run, model, tokenizer, rows = loaded
    choose_plan(run, model, tokenizer, rows, MAKE)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert plan_on_file(run, rows, 1)
    text = (file := run.file("training/step_plan.json")).read_text()
    renamed = {"no plan": "step_plan", "no for": "for", "another key": "recompute_layers"}
    if damage == "cut":
        text = text[: len(text) // 2]
    elif damage == "a list":
        text = json.dumps(json.loads(text) | {"step_plan": [1, 4, 2]})
    else:
        text = text.replace(f'"{renamed[damage]}":', '"other":') if damage in renamed else damage
    file.write_text(text)
    assert plan_on_file(run, rows, 1) is None


def test_a_row_that_does_not_fit_is_no_fault_of_the_machine(loaded, monkeypatch):
    """collect calls a HardwareError infrastructure, "push again": a larger row fits no better in the next session."""
    run, model, tokenizer, rows = loaded
    monkeypatch.setattr(step_plan, "wants_trials", lambda *_: True)
    monkeypatch.setattr(step_plan, "try_plans", lambda *_: [])
    with pytest.raises(OutOfMemory, match=r"lower model\.max_seq_length"):
        choose_plan(run, model, tokenizer, rows, MAKE)
