"""The series' pictures: row lengths, loss curve, and the comparison of both models. Drawn without a display."""

from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure  # no pyplot: no backend, no state shared with the notebook

from utils.evaluation.evaluate import Evaluation
from utils.files import atomic
from utils.report.forest import INK, draw_forest

BASE, TUNED = "#a9b4c6", "#0b5fa5"  # light and dark: told apart in grey, too


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
        axis.text(limit, 0.45, " max_seq_length", color=INK, fontsize=9, va="bottom", ha="right")
    title = f"{len(frame)} training rows: the longest has {longest} tokens, the limit is {limit}"
    _finish(axis, title, xlabel="tokens", xlim=(0, None))
    return _save(figure, path)


def draw_loss(log: pd.DataFrame, path: Path) -> Path:
    """Training loss by step with a running mean, validation loss where there is one, and the learning rate.

    Columns: step, loss, eval_loss, learning_rate.
    """
    figure = Figure(figsize=(10, 3.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    validation, log = log.dropna(subset="eval_loss"), log.dropna(subset="loss")
    if len(log):
        left.plot(log["step"], log["loss"], color=BASE, linewidth=1, label="training, each step")
        smooth = log["loss"].rolling(max(2, len(log) // 15), min_periods=1).mean()
        left.plot(log["step"], smooth, color=TUNED, linewidth=2.2, label="training, running mean")
        if len(validation):
            looks = {"color": "#d1495b", "marker": "o", "markersize": 4, "label": "validation rows"}
            left.plot(validation["step"], validation["eval_loss"], **looks)
        left.legend(frameon=False)
        right.plot(log["step"], log["learning_rate"], color="#30638e", linewidth=2)
    else:
        left.text(0.5, 0.5, "no steps were taken", ha="center", transform=left.transAxes)
    title = "Training and validation loss" if len(validation) else "Training loss"
    _finish(left, title, xlabel="optimizer step", ylabel="nats per token", ylim=(0, None))
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
    if not len(base_loss):
        axis.text(0.5, 0.5, "no held-out losses in this run", ha="center", color=INK, transform=axis.transAxes)
        axis.set(xticks=[], yticks=[], xlabel="", ylabel="")
        return
    base, tuned = base_loss["completion"], tuned_loss["completion"]
    top = max(base.max(), tuned.max()) * 1.08 or 1.0
    axis.fill_between([0, top], [0, top], color=TUNED, alpha=0.07, linewidth=0)
    axis.plot([0, top], [0, top], color=INK, linewidth=1, linestyle="--")
    axis.scatter(base, tuned, s=16, color=TUNED, alpha=0.55, edgecolor="none", clip_on=False)
    axis.text(top * 0.04, top * 0.93, f"lower in {(tuned < base).sum()} of {len(base)} rows", color=INK)
    axis.text(top * 0.97, top * 0.5, "fine-tuned\nbetter", ha="right", va="center", color=TUNED)
    axis.set(xlim=(0, top), ylim=(0, top), aspect="equal")
