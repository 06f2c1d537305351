"""A forest plot of paired differences: every metric turned so that right is better, coloured by what it can tell."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.evaluation.statistics import ALPHA

INK, SOFT = "#23263a", "#667085"
# Okabe and Ito's colours, told apart by colour-blind readers; the markers differ as well, for print in grey.
_SIGNS = {
    "better": ("#00805c", "D", "better"),
    "worse": ("#c44e00", "s", "worse"),
    "cannot tell": (SOFT, "o", "cannot tell: spans zero, or p ≥ 0.05"),
}
_ABOVE = {"textcoords": "offset points", "va": "bottom", "color": INK, "annotation_clip": False}
_FOLD = 5  # a mean that became more than so many times the base's leaves no room on the axis for the others


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
    near_zero = _FOLD * abs(base) <= abs(tuned)
    scale = 100.0 if share else 0.0 if near_zero else 100.0 / abs(base)
    low, high = sorted(turn * scale * end for end in result["ci95"])
    # An interval alone would call a single pair better: it has no width. As in statistics.verdict, the test has to agree.
    p_value = result["p_value"] if result.get("p_holm") is None else result["p_holm"]
    told = p_value < ALPHA and not low <= 0 <= high
    digits = 0 if share or max(abs(base), abs(tuned)) >= 10 else 2
    return Row(
        label=result["label"] + ("" if result["higher_is_better"] else " ↓"),
        values=" → ".join(f"{100 * mean:.0f} %" if share else f"{mean:.{digits}f}" for mean in (base, tuned)),
        change=turn * scale * result["difference"] if scale else None,
        low=low,
        high=high,
        sign=("better" if low > 0 else "worse") if told else "cannot tell",
        share=share,
        weight=weight,
    )


def draw_forest(figure, metrics: dict) -> None:
    """Draw onto a (sub)figure: shares in points and everything else in % of the base, the primary metric on top."""
    from matplotlib.lines import Line2D

    rows = build_rows(metrics)
    groups = [[row for row in rows if row.share == share] for share in (rows[0].share, not rows[0].share)]
    groups = [group for group in groups if group]
    heights = [len(group) + 1.2 for group in groups]
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
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
