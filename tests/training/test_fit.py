"""The search for a fit, against a simulated GPU: it never asks for more than there is, and finds what is fastest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.training.fit import DoesNotFit, Fit, Measured, safer, search

LAYERS = 32


class Gpu:
    """Memory is linear in kept layers and micro-batch; a layer that recomputes costs half as much again."""

    def __init__(self, gib: float, overhead_s: float, base: float = 7.0, fixed: float = 0.5, each: float = 0.2):
        self.gib, self.overhead_s, self.base, self.fixed, self.each = gib, overhead_s, base, fixed, each
        self.asked: list[Fit] = []

    def peak(self, fit: Fit) -> float:
        kept = LAYERS - fit.recompute_layers
        return self.base + fit.per_device_train_batch_size * (self.fixed + self.each * kept)

    def speed(self, fit: Fit) -> float:
        work = 1 + 0.5 * fit.recompute_layers / LAYERS
        return 1 / (work + self.overhead_s / fit.per_device_train_batch_size)

    def measure(self, fit: Fit) -> Measured:
        self.asked.append(fit)
        if self.peak(fit) > self.gib:
            raise DoesNotFit
        return Measured(fit, self.speed(fit), self.peak(fit))


def fastest(gpu: Gpu, rows: int) -> float:
    fits = [Fit(m, rows // m, r) for m in range(1, rows + 1) if rows % m == 0 for r in range(LAYERS + 1)]
    return max(gpu.speed(fit) for fit in fits if gpu.peak(fit) <= gpu.gib)


def test_small_micro_batches_win_where_launches_cost_little():
    gpu = Gpu(gib=13.25, overhead_s=0.01)
    fit, trials = search(gpu.measure, 4, LAYERS, gpu.gib)
    assert fit.per_device_train_batch_size == 1 and fit.gradient_accumulation_steps == 4
    assert gpu.speed(fit) >= 0.99 * fastest(gpu, 4)
    assert len(trials) <= 6  # a larger micro-batch that is slower ends the search


def test_large_micro_batches_win_where_launches_cost_much():
    gpu = Gpu(gib=13.25, overhead_s=3.0)
    fit, _ = search(gpu.measure, 4, LAYERS, gpu.gib)
    assert fit.per_device_train_batch_size == 4 and gpu.speed(fit) >= 0.97 * fastest(gpu, 4)


def test_a_gpu_on_which_nothing_fits_gives_nothing():
    gpu = Gpu(gib=6.0, overhead_s=0.1)
    assert search(gpu.measure, 4, LAYERS, gpu.gib) == (None, [])


def test_an_estimate_that_was_too_bold_is_corrected_by_the_trial():
    gpu = Gpu(gib=10.0, overhead_s=0.01)
    fit, _ = search(gpu.measure, 4, LAYERS, room_gib=13.0)  # says there is more than there is
    assert gpu.peak(fit) <= gpu.gib and any(gpu.peak(asked) > gpu.gib for asked in gpu.asked)


@given(
    gib=st.floats(7.0, 40.0),
    overhead=st.floats(0.0, 5.0),
    each=st.floats(0.0, 1.0),
    rows=st.integers(1, 24),
)
def test_whatever_the_gpu_the_choice_fits_and_takes_every_row(gib, overhead, each, rows):
    gpu = Gpu(gib, overhead, each=each)
    fit, trials = search(gpu.measure, rows, LAYERS, gib)
    if fit is None:
        assert gpu.peak(Fit(1, rows, LAYERS)) > gib
        return
    assert gpu.peak(fit) <= gib and 0 <= fit.recompute_layers <= LAYERS
    assert fit.per_device_train_batch_size * fit.gradient_accumulation_steps == rows
    assert gpu.speed(fit) == max(t.tokens_per_second for t in trials)


@pytest.mark.parametrize("start", [Fit(4, 3, 0), Fit(12, 1, 32), Fit(1, 1, 5), Fit(7, 1, 0)])
def test_falling_back_ends_and_takes_every_row_and_less_memory_each_time(start):
    gpu, fit, steps = Gpu(gib=99, overhead_s=1), start, 0
    while (instead := safer(fit, LAYERS)) is not None:
        assert gpu.peak(instead) < gpu.peak(fit)
        rows = instead.per_device_train_batch_size * instead.gradient_accumulation_steps
        assert rows == start.per_device_train_batch_size * start.gradient_accumulation_steps
        fit, steps = instead, steps + 1
        assert steps < 20
    assert fit.per_device_train_batch_size == 1 and fit.recompute_layers == LAYERS
