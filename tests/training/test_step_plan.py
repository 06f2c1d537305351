"""Trials: what they measure, that they leave the model as it was, and that a fit on file is found again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from benchmarks.recipe import notebook_functions
from utils.config import load_config
from utils.errors import OutOfMemory
from utils.sealed import write_sealed
from utils.training import step_plan as trial
from utils.training.fit import DoesNotFit, Fit, Measured
from utils.training.step_plan import (
    TrialWatch,
    choose_fit,
    fall_back,
    fit_on_file,
    given_fit,
    let_go,
    rows_per_update,
    run_trial,
)

LOAD, MAKE = notebook_functions()


@pytest.fixture
def loaded(training_run):
    run = training_run(train__gradient_checkpointing=True)
    model, tokenizer = LOAD(run.config)
    return run, model, tokenizer, pd.read_parquet(run.file("data/formatted/train.parquet"))


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_a_trial_measures_speed_and_a_search_leaves_the_weights_as_they_were(loaded, capsys):
    run, model, tokenizer, rows = loaded
    before = weights(model)
    measured = run_trial(model, tokenizer, run.config, rows.head(1), MAKE, Fit(2, 2, 1))
    assert measured.tokens_per_second > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))  # it did train
    with torch.no_grad():
        for parameter, value in zip((p for p in model.parameters() if p.requires_grad), before, strict=True):
            parameter.copy_(value)
    fit, trials = trial._search(model, tokenizer, run.config, rows, False, MAKE, 4, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert fit.per_device_train_batch_size * fit.gradient_accumulation_steps == 4 and len(trials) >= 2
    assert "tokens/s" in capsys.readouterr().out


def test_a_trial_counts_the_optimizers_step_once_however_few_of_an_updates_micro_batches_it_takes(loaded):
    watch = TrialWatch(SimpleNamespace(get_batch_samples=None, add_callback=lambda callback: None))
    # Updates of two micro-batches of 100 tokens: a second each, and half a second for the optimizer; one was disturbed.
    watch.ends, watch.tokens, watch.seconds_of_second = [10.0, 12.5, 19.5], [200] * 3, [7.0, 1.0, 3.0]
    assert watch.speed_of(2, tried=2) == pytest.approx(200 / 2.5)
    assert watch.speed_of(8, tried=2) == pytest.approx(800 / 8.5)
    watch.seconds_of_second = []  # of a single one nothing is known, and nothing needed
    assert watch.speed_of(1, tried=1) == pytest.approx(200 / 2.5)

    run, model, tokenizer, rows = loaded
    watches = []

    class Kept(TrialWatch):
        def __init__(self, trainer):
            super().__init__(trainer)
            watches.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "TrialWatch", Kept)
        run_trial(model, tokenizer, run.config, rows.head(1), MAKE, Fit(1, 4, 1))
    (kept,) = watches
    assert len(kept.seconds_of_second) == len(kept.ends) == 3
    assert all(0 < part < whole for part, whole in zip(kept.seconds_of_second[1:], kept.seconds(), strict=True))


def test_running_out_of_memory_in_a_trial_is_an_answer_and_any_other_error_is_not(loaded):
    run, model, tokenizer, rows = loaded

    def failing(message):
        def make(*arguments):
            trainer = MAKE(*arguments)
            trainer.training_step = lambda *_: (_ for _ in ()).throw(RuntimeError(message))
            return trainer

        return make

    with pytest.raises(DoesNotFit):
        run_trial(model, tokenizer, run.config, rows, failing("CUDA out of memory. Tried to allocate"), Fit(1, 1, 0))
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_trial(model, tokenizer, run.config, rows, failing("device-side assert"), Fit(1, 1, 0))


def test_a_trainer_let_go_leaves_nothing_on_the_model(loaded, tmp_path):
    run, model, tokenizer, rows = loaded
    forward = model.forward
    for _ in range(2):
        trainer = MAKE(model, tokenizer, run.config, rows, Fit(4, 1, 0), str(tmp_path))
        trainer.args.max_steps = 1
        trainer.train()
        let_go(trainer)
    assert model.forward == forward and trainer.optimizer is None
    assert all(p.grad is None for p in model.parameters())


def test_as_many_rows_go_into_an_update_whether_the_backend_packs_or_not():
    config = load_config("t4")
    assert rows_per_update(config, packed=True, mean_tokens=684) == 4
    assert rows_per_update(config, packed=False, mean_tokens=684) == 12
    assert rows_per_update(config, packed=False, mean_tokens=5000) == 4
    assert rows_per_update(load_config("tutorial"), packed=False, mean_tokens=684) == 8


@pytest.mark.parametrize(("rows", "micro"), [(8, 2), (4, 2), (3, 1), (1, 1)])
def test_the_given_fit_is_the_profiles_or_what_divides_a_processs_share(rows, micro):
    fit = given_fit(load_config("tutorial"), rows, 32)
    assert (fit.per_device_train_batch_size, fit.gradient_accumulation_steps) == (micro, rows // micro)
    assert fit.recompute_layers == 32


def test_a_fit_is_kept_and_found_again_until_what_it_rests_on_changes(loaded, monkeypatch):
    run, model, tokenizer, rows = loaded
    monkeypatch.setattr(trial, "wants_trials", lambda config: True)
    searched = []

    def search(*arguments):
        searched.append(1)
        return Fit(2, 2, 1), [Measured(Fit(2, 2, 1), 10.0, 1.0)]

    monkeypatch.setattr(trial, "_search", search)
    assert (
        choose_fit(run, model, tokenizer, rows, MAKE) == choose_fit(run, model, tokenizer, rows, MAKE) == Fit(2, 2, 1)
    )
    assert len(searched) == 1
    assert fit_on_file(run, rows, 2) is None  # for two processes it says nothing
    monkeypatch.setattr(trial, "gpus", lambda: (SimpleNamespace(name="Tesla T4", memory_gib=15.0),))
    assert fit_on_file(run, rows, 1) is None  # nor on another GPU
    assert fit_on_file(run, rows.head(9), 1) is None


def test_two_processes_out_of_memory_at_once_fall_back_once(loaded):
    run, model, tokenizer, rows = loaded
    first = choose_fit(run, model, tokenizer, rows, MAKE)
    assert fall_back(run, first, 2) == fall_back(run, first, 2) == Fit(2, 2, 2)
    assert fall_back(run, Fit(2, 2, 2), 2) == Fit(1, 4, 2)
    assert len(json.loads(run.file("training/fit.json").read_text())["ran_out_of_memory"]) == 2
    with pytest.raises(OutOfMemory, match="even with micro-batch 1 x 4"):
        fall_back(run, Fit(1, 4, 2), 2)


def test_a_row_that_does_not_fit_is_no_fault_of_the_machine(loaded, monkeypatch):
    """collect calls a HardwareError infrastructure, "push again": a larger row fits no better in the next session."""
    run, model, tokenizer, rows = loaded
    monkeypatch.setattr(trial, "wants_trials", lambda config: True)
    monkeypatch.setattr(trial, "_search", lambda *_: (None, []))
    with pytest.raises(OutOfMemory, match=r"lower model\.max_seq_length"):
        choose_fit(run, model, tokenizer, rows, MAKE)


def test_launched_processes_take_the_launchers_fit_whatever_their_own_gpu_is(loaded, monkeypatch):
    """Two that cut an update differently would wait for each other for ever."""
    run, model, tokenizer, rows = loaded
    kept = {"fit": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "recompute_layers": 1}}
    write_sealed(run.file("training/fit.json"), {**kept, "world": 2, "basis": "another machine's"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_fit(run, model, tokenizer, rows, MAKE, 2) == Fit(1, 2, 1)
    write_sealed(run.file("training/fit.json"), {**kept, "world": 4, "basis": "another run's"})
    assert choose_fit(run, model, tokenizer, rows, MAKE, 2) == Fit(2, 1, 2)
