"""What listens to the trainer: health that tells and ends, and layers that recompute."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.recipe import notebook_functions
from utils.errors import TrainingError
from utils.models.load import transformer_layers
from utils.training import train_adapter
from utils.training.callbacks import HealthCallback, RecomputeCallback, ShowCallback, Stopwatch


def logged(health: HealthCallback, step: int, **logs) -> dict:
    """The history's entry after the callback saw it."""
    state = SimpleNamespace(global_step=step, log_history=[dict(logs)])
    health.on_log(None, state, None, logs=logs)
    return state.log_history[-1]


def test_a_loss_that_stays_non_finite_ends_the_run_with_a_sentence():
    health, state = HealthCallback(), SimpleNamespace(global_step=9, log_history=[])
    for _ in range(4):
        health.on_log(None, state, None, logs={"loss": float("nan"), "grad_norm": 1.0})
    health.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": 1.0})  # one good step starts the count anew
    for _ in range(4):
        health.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": float("inf")})
    with pytest.raises(TrainingError, match="5 times in a row, last at step 9"):
        health.on_log(None, state, None, logs={"loss": float("nan")})


def show_updates(monkeypatch, capsys, seconds: float, updates: int, baseline_s: float | None) -> str:
    """What is printed above the bar during three updates of so many seconds each, of `updates` in all."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    shown, state = ShowCallback(None, baseline_s), SimpleNamespace(global_step=0, max_steps=updates, log_history=[])
    shown.on_train_begin(None, state, None)
    for seconds_of_this in (10 * seconds, seconds, seconds):  # the first one compiles
        clock.now, state.global_step = clock.now + seconds_of_this, state.global_step + 1
        shown.on_step_end(None, state, None)
    shown.close()
    return "\n".join(line for line in capsys.readouterr().out.splitlines() if "Forecast" in line)


def test_a_long_training_says_once_what_the_rest_and_the_comparison_will_take(monkeypatch, capsys):
    said = show_updates(monkeypatch, capsys, seconds=12.0, updates=302, baseline_s=2820.0)
    assert said.endswith(
        "Forecast: about 60 min more for 300 updates (12.0 s each so far). Then 04: about 47 min, as 01 took."
    )


def test_without_a_baseline_the_training_alone_is_forecast_and_a_short_one_not_at_all(monkeypatch, capsys):
    assert "04" not in show_updates(monkeypatch, capsys, seconds=12.0, updates=302, baseline_s=None)
    assert show_updates(monkeypatch, capsys, seconds=0.2, updates=180, baseline_s=12.0) == ""


def test_fp16s_scale_is_on_record_and_its_first_skips_are_named_as_normal(capsys):
    scaler = SimpleNamespace(get_scale=lambda: 32768.0)
    health = HealthCallback(scaler)
    assert logged(health, 1, loss=2.0, grad_norm=float("inf"))["scale"] == 32768.0
    said = capsys.readouterr().out
    assert (
        said
        == "step 1: gradient not finite; the update was skipped, fp16 scale now 32768 (normal in the first steps)\n"
    )
    logged(health, 2, loss=float("nan"), grad_norm=1.0)  # a loss that is not finite never is
    assert capsys.readouterr().out.startswith("step 2: loss not finite") and health.bad_steps == 1
    logged(health, 3, loss=2.0, grad_norm=1.0)
    assert health.bad_steps == 0 and capsys.readouterr().out == ""
    logged(health, 50, loss=2.0, grad_norm=float("inf"))
    assert "normal" not in capsys.readouterr().out and health.bad_steps == 1


def test_fp16s_scaler_may_come_down_to_one_before_the_first_good_step():
    """From 65,536 each overflow halves the scale: sixteen skipped steps are how it settles, not a training gone wrong."""
    scaler = SimpleNamespace(scale=65536.0, get_scale=lambda: scaler.scale)
    health = HealthCallback(scaler)

    def skip(step: int) -> None:
        scaler.scale /= 2
        logged(health, step, loss=2.0, grad_norm=float("inf"))

    for step in range(1, 17):
        skip(step)
    assert scaler.scale == 1.0
    logged(health, 17, loss=2.0, grad_norm=1.0)
    for step in range(18, 22):
        skip(step)
    with pytest.raises(TrainingError, match="5 times in a row, last at step 22"):  # it had settled
        skip(22)


def test_a_scaler_that_never_settles_ends_the_run_and_so_does_a_loss_that_is_not_finite():
    scaler = SimpleNamespace(scale=65536.0, get_scale=lambda: scaler.scale)
    health = HealthCallback(scaler)
    with pytest.raises(TrainingError, match="last at step 21"):
        for step in range(1, 100):
            scaler.scale /= 2
            logged(health, step, loss=2.0, grad_norm=float("inf"))
    health = HealthCallback(SimpleNamespace(get_scale=lambda: 65536.0))
    with pytest.raises(TrainingError, match="last at step 5"):
        for step in range(1, 100):
            logged(health, step, loss=float("nan"), grad_norm=1.0)


def test_the_sentence_at_the_end_names_the_scale():
    health = HealthCallback(SimpleNamespace(get_scale=lambda: 0.5))
    with pytest.raises(TrainingError, match=r"last at step 5 \(fp16 scale 0.5\)"):
        for step in range(1, 6):
            logged(health, step, loss=float("nan"), grad_norm=1.0)


def test_without_a_scaler_nothing_is_said_of_one(capsys):
    assert logged(HealthCallback(None), 1, loss=float("inf"), grad_norm=1.0)["scale"] is None
    assert capsys.readouterr().out == "step 1: loss not finite\n"


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])}, 5),
        ({"packed_seq_lengths": torch.tensor([3, 4])}, 7),
        ({}, 8),
    ],
)
def test_a_stopwatch_counts_no_padding(more, tokens):
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), **more}
    trainer = SimpleNamespace(get_batch_samples=lambda: ([batch, batch], 1), add_callback=lambda callback: None)
    watch = Stopwatch(trainer)
    assert trainer.get_batch_samples() == ([batch, batch], 1) and watch.tokens == [2 * tokens]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_first_layers_recompute_whatever_was_switched_on_before(tiny_model, count):
    model = get_peft_model(copy.deepcopy(tiny_model[0]), LoraConfig(r=2, target_modules=["q_proj"]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    RecomputeCallback(count).on_step_begin(None, None, None, model=model)
    runs = [0, 0]
    for number, layer in enumerate(transformer_layers(model)):
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    ids = torch.arange(8).unsqueeze(0)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert runs == [2 if number < count else 1 for number in range(2)]


def test_the_bar_is_closed_where_training_ends_by_an_error(training_run, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, *_):
            self.closed = False
            bars.append(self)

        def update(self, *_, **__):
            pass

        def close(self):
            self.closed = True

    monkeypatch.setattr("utils.training.callbacks.Progress", Bar)
    load_with_lora, make_trainer = notebook_functions()

    def failing(*arguments):
        trainer = make_trainer(*arguments)
        trainer.training_step = lambda *_, **__: 1 / 0
        return trainer

    with pytest.raises(ZeroDivisionError):
        train_adapter(training_run(), load_with_lora, failing)
    assert [bar.closed for bar in bars] == [True]
