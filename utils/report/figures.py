"""The series' pictures: row lengths, loss curve, and the comparison of both models. Drawn without a display."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure  # no pyplot: no backend, no state shared with the notebook
from matplotlib.lines import Line2D

from utils.evaluation.evaluate import Evaluation
from utils.evaluation.statistics import Result, verdict
from utils.files import atomic

BASE, TUNED = "#a9b4c6", "#0b5fa5"  # light and dark: told apart in grey, too
INK, SOFT = "#23263a", "#667085"
# Okabe and Ito's colours, told apart by colour-blind readers; the markers differ as well, for print in grey.
_SIGNS = {
    "better": ("#00805c", "D", "better"),
    "worse": ("#c44e00", "s", "worse"),
    "cannot tell": (SOFT, "o", "cannot tell: spans zero, or p ≥ 0.05"),
}
_ABOVE = {"textcoords": "offset points", "va": "bottom", "color": INK, "annotation_clip": False}
_FOLD = 5  # a mean that became more than so many times the base's leaves no room on the axis for the others


def _finish(axis, title: str, **labels) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, loc="left", color=INK)
    axis.set(**labels)


def _save(figure, path: Path) -> Path:
    with atomic(path) as scratch:
        # Without matplotlib's version in its metadata the same numbers give the same file.
        figure.savefig(scratch, format="png", metadata={"Software": None})
    return path


def draw_lengths(frame: pd.DataFrame, limit: int, path: Path) -> Path:
    """Box plots of tokens in a row (columns prompt_tokens, reasoning_tokens, response_tokens) against the limit."""
    figure = Figure(figsize=(9, 3.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    parts = {name: frame[f"{name}_tokens"] for name in ("prompt", "reasoning", "response")}
    parts["whole row"] = sum(parts.values())
    labels = [f"{name}\nmedian {values.median():.0f}" for name, values in parts.items()]
    boxes = axis.boxplot(
        list(parts.values()), orientation="horizontal", widths=0.6, patch_artist=True, tick_labels=labels,
        flierprops={"markersize": 3, "markeredgecolor": BASE}, medianprops={"color": INK, "linewidth": 1.8},
    )  # fmt: skip
    for box, colour in zip(boxes["boxes"], ("#edae49", TUNED, "#30638e", BASE), strict=True):
        box.set(facecolor=colour, alpha=0.8, edgecolor=INK)
    axis.invert_yaxis()
    longest = int(parts["whole row"].max())
    if limit < 1.5 * longest:
        axis.axvline(limit, color=INK, linewidth=1.6, linestyle="--")
    dashed = " (dashed)" if limit < 1.5 * longest else ""
    title = f"{len(frame)} training rows: the longest has {longest} tokens, max_seq_length{dashed} is {limit}"
    _finish(axis, title, xlabel="tokens", xlim=(0, None))
    return _save(figure, path)


def draw_loss(log: pd.DataFrame, path: Path) -> Path:
    """Training loss by step with a running mean, validation loss where there is one, and the learning rate.

    Columns: step, loss, eval_loss, learning_rate.
    """
    figure = Figure(figsize=(10, 3.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    validation, log = log.dropna(subset="eval_loss"), log.dropna(subset="loss")
    left.plot(log["step"], log["loss"], color=BASE, linewidth=1, label="training, each step")
    smooth = log["loss"].rolling(max(2, len(log) // 15), min_periods=1).mean()
    left.plot(log["step"], smooth, color=TUNED, linewidth=2.2, label="training, running mean")
    if len(validation):
        looks = {"color": "#d1495b", "marker": "o", "markersize": 4, "label": "validation rows"}
        left.plot(validation["step"], validation["eval_loss"], **looks)
    left.legend(frameon=False)
    right.plot(log["step"], log["learning_rate"], color="#30638e", linewidth=2)
    title = "Training and validation loss" if len(validation) else "Training loss"
    _finish(left, title if len(log) else "No steps", xlabel="optimizer step", ylabel="nats per token", ylim=(0, None))
    _finish(right, "Learning rate", xlabel="optimizer step", ylim=(0, None))
    return _save(figure, path)


def draw_comparison(base: Evaluation, tuned: Evaluation, metrics: dict, path: Path) -> Path:
    """Four panels: both models' accuracy, every paired difference, tokens of reasoning, each row's loss before and after."""
    return _save(compose_comparison(base, tuned, metrics), path)


def compose_comparison(base: Evaluation, tuned: Evaluation, metrics: dict):
    """`draw_comparison`'s matplotlib Figure; `metrics` is what comparison/metrics.json holds."""
    rows = 1 + len(metrics["secondary"])
    heights = (max(3.9, 1.9 + 0.34 * rows), 4.1)
    figure = Figure(figsize=(11, sum(heights)), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    left, right = top.subfigures(1, 2, width_ratios=(1, 1.7))
    lengths, losses = bottom.subplots(1, 2, width_ratios=(1.35, 1))
    draw_bars(left.subplots(), metrics)
    draw_forest(right, metrics)
    _draw_reasoning(lengths, base.scored, tuned.scored)
    _draw_losses(losses, base.loss, tuned.loss)
    return figure


def draw_bars(axis, metrics: dict) -> None:
    """Both models' shares with their intervals, of up to three results: where right answers decide nothing, well-formed ones
    beside them, so that form and knowledge are seen apart."""
    results = {result["name"]: result for result in (metrics["primary"], *metrics["secondary"])}
    title, chosen = "Right answers", [result for result in results.values() if "accuracy" in result["label"]][:3]
    if metrics["primary"] not in chosen:
        names = [name for name in ("well_formed", "multiple_choice", "multiple_choice_forced") if name in results]
        title, chosen = "Form and knowledge" if len(names) > 1 else "Form of the answers", [results[n] for n in names]
    unit = " %" if len(chosen) < 3 else ""  # three pairs leave no room for units
    for offset, model, colour, name in ((-0.2, "base", BASE, "base"), (0.2, "tuned", TUNED, "fine-tuned")):
        at, values = np.arange(len(chosen)) + offset, 100 * np.array([result[model] for result in chosen])
        ends = 100 * np.array([result[f"{model}_ci95"] for result in chosen]).T
        errors = np.maximum(0.0, [values - ends[0], ends[1] - values])
        axis.bar(at, values, width=0.37, color=colour, yerr=errors, ecolor=INK, capsize=4, label=name)
        for x, value, high in zip(at, values, ends[1], strict=True):
            axis.annotate(f"{value:.0f}{unit}", (x, high), (0, 4), textcoords="offset points", ha="center", color=INK)
    labels = [fill(result["label"], max(11, 33 // len(chosen)), break_long_words=False) for result in chosen]
    axis.set_xticks(range(len(chosen)), labels)
    axis.set_yticks([0, 25, 50, 75, 100], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.legend(frameon=False, loc="upper left", ncols=2, columnspacing=1.2, handlelength=1.2)
    _finish(axis, f"{title}, 95 % intervals", xlim=(-0.6, len(chosen) - 0.4), ylim=(0, 120))


@dataclass(frozen=True)
class Row:
    """One metric: its change and interval, both positive where fine-tuning helped (points, or % of the base)."""

    label: str
    values: str  # both models' means, such as 17 % → 84 %
    change: float | None  # None: the base is near 0, and nothing can be told in % of it
    low: float
    high: float
    sign: str
    share: bool
    weight: str  # bold for the primary metric


def build_rows(metrics: dict) -> list[Row]:
    """The rows of metrics.json's results, primary first."""
    return [_build_row(metrics["primary"], "bold"), *(_build_row(one, "normal") for one in metrics["secondary"])]


def _build_row(result: dict, weight: str) -> Row:
    base, tuned, share = result["base"], result["tuned"], result["unit"] == "share"
    turn = 1.0 if result["higher_is_better"] else -1.0
    near_zero = not share and _FOLD * abs(base) <= abs(tuned)
    scale = 0.0 if near_zero else 100.0 / (1 if share else abs(base))
    low, high = sorted(turn * scale * end for end in result["ci95"])
    digits = 0 if share or max(abs(base), abs(tuned)) >= 10 else 2
    return Row(
        label=result["label"] + ("" if result["higher_is_better"] else " ↓"),
        values=" → ".join(f"{100 * mean:.0f} %" if share else f"{mean:.{digits}f}" for mean in (base, tuned)),
        change=turn * scale * result["difference"] if scale else None,
        low=low,
        high=high,
        sign=verdict(Result.model_validate(result), result["p_holm"]),
        share=share,
        weight=weight,
    )


def draw_forest(figure, metrics: dict) -> None:
    """Draw a forest plot of paired differences onto a (sub)figure, each turned so that right is better.

    Shares are in points, everything else in % of the base; the primary metric is on top.
    """
    rows = build_rows(metrics)
    groups = [[row for row in rows if row.share == share] for share in (rows[0].share, not rows[0].share)]
    groups = [group for group in groups if group]
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(group) + 1.2 for group in groups])[:, 0]
    for axis, group in zip(axes, groups, strict=True):
        _draw_group(axis, group)
    axes[0].set_title("Change by fine-tuning, 95 % intervals", loc="left", pad=24, color=INK)
    for x, text, ha in ((-6, "← worse", "right"), (6, "better →", "left")):
        axes[0].annotate(text, (0, 1), (x, 4), **_ABOVE, xycoords=axes[0].get_xaxis_transform(), ha=ha, weight="bold")
    axes[0].annotate("base → fine-tuned", (1.02, 1), (0, 4), **_ABOVE, xycoords="axes fraction")
    found = {row.sign for row in rows if row.change is not None}
    figure.legend(
        handles=[
            Line2D([], [], color=colour, marker=marker, markersize=7, linewidth=2.2, label=label)
            for sign, (colour, marker, label) in _SIGNS.items()
            if sign in found
        ],
        title="bold: the primary metric; p of what only describes: Holm's", loc="outside lower center", ncols=3, frameon=False,
        handletextpad=0.3,
    )  # fmt: skip


def _draw_group(axis, rows: Sequence[Row]) -> None:
    """One axis: a line for each row, its interval, and the means of both models at the right edge."""
    ends = [end for row in rows for end in (row.low, row.high, row.change or 0.0)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.35 * max(high - low, 5.0)  # on either side of zero, for the words above it
    low, high = min(1.1 * low, -room), max(1.1 * high, room)
    axis.axvspan(0, high, color=_SIGNS["better"][0], alpha=0.06, linewidth=0)
    axis.axvline(0, color=INK, linewidth=1.2)
    beside = {"transform": axis.get_yaxis_transform(), "va": "center"}
    for y, row in enumerate(rows):
        axis.text(1.02, y, row.values, weight=row.weight, color=INK, **beside)
        if row.change is None:
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axis.text(0.03, y, "base is near 0: no % of it", color=SOFT, bbox=behind, **beside)
            continue
        (colour, marker, _), bold = _SIGNS[row.sign], row.weight == "bold"
        axis.plot([row.low, row.high], [y, y], color=colour, linewidth=3.4 if bold else 2.2, zorder=3)
        axis.plot(row.change, y, marker, color=colour, markersize=8 if bold else 6, zorder=4)
    axis.set(xlim=(low, high), ylim=(len(rows) - 0.4, -0.6))
    axis.set_yticks(range(len(rows)), [row.label for row in rows], color=INK)
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_weight(row.weight)
    turned = "  (↓ less is better: sign turned)" if any(row.label.endswith("↓") for row in rows) else ""
    axis.set_xlabel(f"improvement in {'percentage points' if rows[0].share else '% of the base'}{turned}", color=INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e4e7ec", linewidth=0.8)
    axis.set_axisbelow(True)


def _draw_reasoning(axis, base: pd.DataFrame, tuned: pd.DataFrame) -> None:
    """Tokens of reasoning of both models, and the token cap where it cut answers off."""
    _finish(axis, "Length of the reasoning", xlabel="tokens", ylabel="answers")
    frames = {"base": base, "fine-tuned": tuned}
    cut = pd.concat([frame.loc[frame["stopped"] == 0, "tokens"] for frame in frames.values()])
    top = max(*(frame["reasoning_tokens"].max() for frame in frames.values()), cut.max() if len(cut) else 0, 1)
    bins = np.linspace(0, top, 41)
    looks = {"base": {"color": BASE}, "fine-tuned": {"color": TUNED, "histtype": "step", "linewidth": 2}}
    for name, frame in frames.items():
        label = f"{name}: {frame['reasoning_tokens'].mean():.0f} on average"
        if len(cut):
            label += f", {100 * (frame['stopped'] == 0).mean():.0f} % cut off"
        axis.hist(frame["reasoning_tokens"], bins=bins, label=label, **looks[name])
    axis.set_ylim(top=axis.get_ylim()[1] * 1.3)  # room for the legend above the bars
    if len(cut):
        axis.axvline(cut.max(), color=INK, linewidth=1.4, linestyle="--")
        axis.text(cut.max(), axis.get_ylim()[1] * 0.93, f"cap: {cut.max():.0f} tokens ", ha="right", color=INK)
    axis.legend(frameon=False, loc="upper left")
    axis.yaxis.get_major_locator().set_params(integer=True)


def _draw_losses(axis, base_loss: pd.DataFrame, tuned_loss: pd.DataFrame) -> None:
    """One point for each held-out row: below the diagonal, fine-tuning made the reference less surprising."""
    _finish(axis, "Loss on each held-out row", xlabel="base (nats per token)", ylabel="fine-tuned")
    base, tuned = base_loss["completion"], tuned_loss["completion"]
    if base.empty:
        axis.text(0.5, 0.5, "no held-out losses in this run", ha="center", color=INK, transform=axis.transAxes)
        axis.set(xticks=[], yticks=[], xlabel="", ylabel="")
        return
    top = 1.08 * max([*base, *tuned]) or 1.0
    axis.fill_between([0, top], [0, top], color=TUNED, alpha=0.07, linewidth=0)
    axis.plot([0, top], [0, top], color=INK, linewidth=1, linestyle="--")
    axis.scatter(base, tuned, s=16, color=TUNED, alpha=0.55, edgecolor="none", clip_on=False)
    axis.text(top * 0.04, top * 0.93, f"lower in {(tuned < base).sum()} of {len(base)} rows", color=INK)
    axis.text(top * 0.97, top * 0.5, "fine-tuned\nbetter", ha="right", va="center", color=TUNED)
    axis.set(xlim=(0, top), ylim=(0, top), aspect="equal")
