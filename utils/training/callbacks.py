"""What listens to the trainer: progress, speed, tracking, health, the session's end, and which layers recompute."""

import math
import time

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from utils.errors import TrainingError
from utils.hardware import peak_memory
from utils.models.load import transformer_layers
from utils.pipeline.signals import StopRequest
from utils.pipeline.time_limit import Deadline
from utils.progress import Progress, show_duration
from utils.report.tracking import Tracker

_PATIENCE = 5  # non-finite steps in a row before a run is ended


class ShowCallback(TrainerCallback):
    """Draws the bar, says once how long the rest will take, and sends what is logged to the tracker."""

    def __init__(self, tracker: Tracker, baseline_s: float | None = None):
        self.tracker, self.bar, self._ends = tracker, None, []
        self.ahead = f"Then 04: about {show_duration(baseline_s)}, as 01 took." if baseline_s else ""

    def on_train_begin(self, args, state, control, **_):
        self.bar = Progress("training", state.max_steps, "step")
        self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        names = {"loss": "loss", "eval_loss": "validation"}
        last = {names[key]: float(entry[key]) for entry in state.log_history[-100:] for key in names if key in entry}
        self.bar.update(1, note=", ".join(f"{name} {value:.3f}" for name, value in last.items()))
        self._ends.append(time.monotonic())
        left, each = state.max_steps - state.global_step, (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
        self.bar.forecast(left * each, f"{left} updates ({each:.1f} s each so far). {self.ahead}")

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            names = ("loss", "learning_rate", "grad_norm", "mean_token_accuracy", "scale")
            logged = logs | state.log_history[-1]
            values = {f"train/{name}": float(logged[name]) for name in names if logged.get(name) is not None}
            memory = {f"memory/{name}": value for name, value in peak_memory().items()}
            self.tracker.log(values | memory, step=state.global_step)
        if "eval_loss" in (logs or {}):
            self.tracker.log({"eval/loss": float(logs["eval_loss"])}, step=state.global_step)

    def close(self) -> None:
        """Leave the bar where it stands, also where training ended by an error, of which the trainer does not inform us."""
        if self.bar is not None:
            self.bar.close()


class Stopwatch(TrainerCallback):
    """When each update ended (monotonic seconds, GPU work included) and how many tokens it held, padding not counted."""

    def __init__(self, trainer):
        self.ends: list[float] = []
        self.tokens: list[int] = []
        take = trainer.get_batch_samples

        def counted(*arguments, **keywords):
            batches, items = take(*arguments, **keywords)
            self.tokens.append(sum(map(_tokens_of, batches)))
            return batches, items

        trainer.get_batch_samples = counted
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())

    def seconds(self) -> list[float]:
        """How long each update after the first took."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def _tokens_of(batch) -> int:
    told = batch.get("attention_mask", batch.get("packed_seq_lengths"))  # the latter are unsloth's
    return batch["input_ids"].numel() if told is None else int(told.sum())


class HealthCallback(TrainerCallback):
    """Watches loss, gradient and fp16's scale: names a step that was skipped, ends a run that stays non-finite.

    `scaler` is the trainer's `torch.amp.GradScaler`, or None where nothing is scaled. It starts at 65,536 and halves at
    each overflow until it has found its scale; until then, down to 1, an infinite gradient is normal.
    """

    def __init__(self, scaler=None):
        self.scaler, self.bad_steps, self.settled = scaler, 0, scaler is None

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in (logs or {}):
            return
        scale = self.scaler.get_scale() if self.scaler is not None else None
        if state.log_history:
            state.log_history[-1]["scale"] = scale
        wrong = [name for name in ("loss", "grad_norm") if name in logs and not math.isfinite(float(logs[name]))]
        if not wrong:
            self.bad_steps, self.settled = 0, True
            return
        settling = not self.settled and wrong == ["grad_norm"] and scale >= 1
        self.bad_steps += 0 if settling else 1
        if self.bad_steps >= _PATIENCE:
            at = f"last at step {state.global_step}" + ("" if scale is None else f" (fp16 scale {scale:g})")
            instead = "lower train.learning_rate or train.max_grad_norm and run 03 again"
            raise TrainingError(f"Loss or gradient was not finite {_PATIENCE} times in a row, {at}; {instead}.")
        what = " and ".join(wrong).replace("grad_norm", "gradient")
        after = "" if scale is None else f"; the update was skipped, fp16 scale now {scale:g}"
        print(f"step {state.global_step}: {what} not finite{after}{' (normal in the first steps)' if settling else ''}")


class BestCallback(TrainerCallback):
    """Saves a checkpoint at each new lowest validation loss, which the trainer alone does not between two save_steps."""

    def on_evaluate(self, args, state, control, metrics=None, **_):
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            control.should_save = True


class RecomputeCallback(TrainerCallback):
    """Lets the first `count` layers compute their activations again on the way back, and the others keep theirs."""

    def __init__(self, count: int):
        self.count = count

    def on_step_begin(self, args, state, control, model=None, **_):
        # At every step: unsloth's for_training and the trainer's own enabling switch all layers on again.
        for number, layer in enumerate(transformer_layers(model)):
            layer.gradient_checkpointing = number < self.count


class SessionCallback(TrainerCallback):
    """Saves a checkpoint and stops once `ended` is "deadline" (the session's time is up) or "asked" (to stop)."""

    def __init__(self, deadline: Deadline, stop: StopRequest):
        self.deadline, self.stop, self.ended = deadline, stop, ""
        self._last = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        took, self._last = time.monotonic() - self._last, time.monotonic()
        if state.global_step >= state.max_steps:
            return
        decision = "asked" if self.stop.asked else "deadline" if self.deadline.is_due(next_s=took) else ""
        (self.ended,) = broadcast_object_list([decision])  # the first process's: all of them stop at the same step
        if self.ended:
            control.should_save = control.should_training_stop = True
