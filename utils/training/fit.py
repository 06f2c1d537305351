"""How a training step is computed: micro-batch, accumulation, recomputed layers.

It decides speed and memory, never what is learnt: every choice takes the same rows into the same update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """One way to compute an update of `per_device_train_batch_size * gradient_accumulation_steps` rows on each GPU.

    `recompute_layers`: so many of the model's layers, the first ones, compute their activations again on the way back;
    the others keep them. The first ones, since their turn comes when the others' memory is free again.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    recompute_layers: int

    def __str__(self) -> str:
        return (
            f"micro-batch {self.per_device_train_batch_size} x {self.gradient_accumulation_steps}, "
            f"{self.recompute_layers} layers recompute"
        )


@dataclass(frozen=True)
class Measured:
    """What a trial of `fit` showed: tokens per second, and the peak of allocated memory in GiB."""

    fit: Fit
    tokens_per_second: float
    peak_gib: float


class DoesNotFit(Exception):
    """A trial ran out of memory."""


def search(
    measure: Callable[[Fit], Measured], rows: int, layers: int, room_gib: float
) -> tuple[Fit | None, list[Measured]]:
    """The fastest fit for an update of `rows` rows, and all trials; None where not even the smallest one fits.

    For each micro-batch that divides `rows`, from 1 on: memory is measured with all `layers` recomputing, and once with
    an eighth of them keeping activations; the line through both says how many can keep theirs within `room_gib`, which
    a further trial confirms or corrects. A larger micro-batch is tried as long as it is faster: it keeps fewer.
    """
    trials: list[Measured] = []

    def attempt(fit: Fit) -> Measured | None:
        try:
            trials.append(measure(fit))
        except DoesNotFit:
            return None
        return trials[-1]

    best, each = None, None  # GiB that one row's activations take in one layer
    for micro in (n for n in range(1, rows + 1) if rows % n == 0):
        found, each = _fastest_with(micro, rows // micro, attempt, layers, room_gib, each)
        if found is None or (best and found.tokens_per_second <= best.tokens_per_second):
            break
        best = found
    return (best.fit if best else None), trials


def _fastest_with(
    micro: int, accumulate: int, attempt, layers: int, room_gib: float, each: float | None
) -> tuple[Measured | None, float | None]:
    step = max(1, layers // 8)
    tried = [attempt(Fit(micro, accumulate, layers))]
    if tried[0] is None:
        return None, each
    if each is None:
        tried.append(attempt(Fit(micro, accumulate, layers - step)))
        if tried[1] is None:
            return tried[0], each
        each = max((tried[1].peak_gib - tried[0].peak_gib) / step / micro, 1e-6)
    keep = min(layers, int((room_gib - tried[0].peak_gib) / (each * micro)))
    while keep > (step if len(tried) == 2 else 0):
        most_keep = attempt(Fit(micro, accumulate, layers - keep))
        if most_keep is not None:
            tried.append(most_keep)
            break
        keep -= max(1, layers // 16)
    return max(tried, key=lambda measured: measured.tokens_per_second), each


def safer(fit: Fit, layers: int) -> Fit | None:
    """What to go on with after `fit` ran out of memory: more layers recompute, then smaller micro-batches; None at the end."""
    if fit.recompute_layers < layers:
        more = min(layers, fit.recompute_layers + max(1, layers // 4))
        return Fit(fit.per_device_train_batch_size, fit.gradient_accumulation_steps, more)
    micro, rows = fit.per_device_train_batch_size, fit.per_device_train_batch_size * fit.gradient_accumulation_steps
    smaller = [n for n in range(1, micro) if rows % n == 0]
    return Fit(smaller[-1], rows // smaller[-1], layers) if smaller else None
