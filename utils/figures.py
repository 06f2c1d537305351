"""The series' pictures: row lengths, loss curve, and the comparison of both arms. Drawn without a display."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from utils.comparison import Arms
from utils.files import atomic
from utils.statistics import wilson_interval

BASE, TUNED, INK = "#8d99ae", "#d1495b", "#2b2d42"


def _figure(columns: int, width: float, height: float):
    from matplotlib.figure import Figure  # no pyplot: no backend, no state shared with the notebook

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
        axis.title.set_color(INK)
    return figure, axes


def _save(figure, path: Path) -> Path:
    with atomic(path) as scratch:
        # Without the date in its metadata the same numbers give the same file.
        figure.savefig(scratch, format="png", metadata={"Software": None})
    return path


def draw_lengths(frame: pd.DataFrame, limit: int, path: Path) -> Path:
    """Box plots of tokens in a row (columns prompt_tokens, reasoning_tokens, response_tokens) against the limit."""
    figure, (axis,) = _figure(1, 9, 3.2)
    parts = {name: frame[f"{name}_tokens"] for name in ("prompt", "reasoning", "response")}
    parts["whole row"] = sum(parts.values())
    colours = ("#edae49", TUNED, "#30638e", BASE)
    boxes = axis.boxplot(
        list(parts.values()),
        orientation="horizontal",
        widths=0.6,
        patch_artist=True,
        flierprops={"markersize": 3, "markeredgecolor": BASE},
        medianprops={"color": INK, "linewidth": 1.8},
    )
    for box, colour in zip(boxes["boxes"], colours, strict=True):
        box.set(facecolor=colour, alpha=0.8, edgecolor=INK)
    labels = [f"{name}\nmedian {values.median():.0f}" for name, values in parts.items()]
    axis.set_yticks(range(1, len(parts) + 1), labels)
    axis.invert_yaxis()
    longest = int(parts["whole row"].max())
    if limit < 1.5 * longest:
        axis.axvline(limit, color=INK, linewidth=1.6, linestyle="--")
        axis.text(limit, 0.45, " max_seq_length", color=INK, fontsize=9, va="bottom", ha="right")
    axis.set(
        title=f"{len(frame)} training rows: the longest has {longest} tokens, the limit is {limit}", xlabel="tokens"
    )
    axis.set_xlim(left=0)
    return _save(figure, path)


def draw_loss(log: pd.DataFrame, path: Path) -> Path:
    """Training loss by step with a running mean, and the learning rate (columns step, loss, learning_rate)."""
    figure, (left, right) = _figure(2, 10, 3.4)
    if len(log):
        left.plot(log["step"], log["loss"], color=BASE, linewidth=1, label="each step")
        smooth = log["loss"].rolling(max(2, len(log) // 15), min_periods=1).mean()
        left.plot(log["step"], smooth, color=TUNED, linewidth=2.2, label="running mean")
        left.legend(frameon=False)
        right.plot(log["step"], log["learning_rate"], color="#30638e", linewidth=2)
    else:
        left.text(0.5, 0.5, "no steps were taken", ha="center", transform=left.transAxes)
    left.set(title="Training loss", xlabel="optimizer step", ylabel="nats per token", ylim=(0, None))
    right.set(title="Learning rate", xlabel="optimizer step", ylim=(0, None))
    return _save(figure, path)


def draw_comparison(arms: Arms, metrics: dict, path: Path) -> Path:
    """Three panels: shares with Wilson intervals, tokens of reasoning, and each row's loss before and after."""
    figure, (shares, lengths, losses) = _figure(3, 11.5, 3.7)
    _draw_shares(shares, metrics)
    if len(arms.base):
        top = max(arms.base["reasoning_tokens"].max(), arms.tuned["reasoning_tokens"].max(), 1)
        bins = np.linspace(0, top * 1.02, 41)
        for frame, colour, label in ((arms.base, BASE, "base"), (arms.tuned, TUNED, "fine-tuned")):
            mean = frame["reasoning_tokens"].mean()
            text = f"{label}: {mean:.0f} on average"
            lengths.hist(frame["reasoning_tokens"], bins=bins, color=colour, alpha=0.75, label=text)
        lengths.set_ylim(top=lengths.get_ylim()[1] * 1.22)  # room for the legend above the bars
        lengths.legend(frameon=False, loc="upper center")
    lengths.set(title="Length of the reasoning", xlabel="tokens", ylabel="answers")
    if len(arms.base_nll):
        base, tuned = arms.base_nll["completion"], arms.tuned_nll["completion"]
        losses.scatter(base, tuned, s=14, color=TUNED, alpha=0.55, edgecolor="none")
        top = max(base.max(), tuned.max()) * 1.08
        losses.plot([0, top], [0, top], color=INK, linewidth=1, linestyle="--")
        losses.text(top * 0.62, top * 0.8, "no change", ha="right", color=INK, fontsize=9)
        losses.set(xlim=(0, top), ylim=(0, top))
    losses.set(title="Loss on each held-out row", xlabel="base (nats per token)", ylabel="fine-tuned")
    return _save(figure, path)


def _draw_shares(axis, metrics: dict) -> None:
    """Bars of every share metric in both arms; Wilson intervals take the items as independent."""
    results = [r for r in (metrics["primary"], *metrics["secondary"]) if r["name"] in SHARES]
    results = [r for r in results if r["name"] != "stopped"][:4]
    for row, result in enumerate(results):
        for offset, arm, colour in ((-0.19, "base", BASE), (0.19, "tuned", TUNED)):
            value = result[arm]
            low, high = wilson_interval(round(value * result["n"]), result["n"])
            errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axis.barh(row + offset, value, height=0.36, color=colour, xerr=errors, ecolor=INK, capsize=2.5)
            axis.text(min(high + 0.02, 1.03), row + offset, f"{value:.0%}", va="center", fontsize=9, color=INK)
    axis.set_yticks(range(len(results)), [LABELS[r["name"]][0].replace("answers ", "answers\n") for r in results])
    axis.invert_yaxis()
    axis.set(title="Share of held-out answers", xlim=(0, 1.12))
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
