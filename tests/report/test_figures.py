"""The comparison's picture: right is better, nothing claims more than the statistics do, and no words overlap."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

from utils.evaluation.evaluate import Evaluation
from utils.evaluation.statistics import compare_paired
from utils.report.figures import build_rows, compose_comparison, draw_comparison

LABELS = {
    "correct": ("multiple-choice accuracy", "share", True),
    "well_formed": ("well-formed answers", "share", True),
    "bullets": ("answers with bullets", "share", False),
    "stopped": ("answers that end by themselves", "share", True),
    "reasoning_tokens": ("tokens of reasoning", "tokens", False),
    "completion": ("held-out loss (nats per token)", "nats per token", False),
    "reasoning": ("held-out loss of the reasoning", "nats per token", False),
    "response": ("held-out loss of the response", "nats per token", False),
}
CAP = 1024


def result(name: str, base, tuned) -> dict:
    """One entry of metrics.json."""
    label, unit, higher_is_better = LABELS[name]
    groups = [str(i) for i in range(len(base))]
    paired = compare_paired(name, base, tuned, groups, higher_is_better=higher_is_better, resamples=1000).model_dump()
    means = {"base_ci95": around(base), "tuned_ci95": around(tuned)}
    return {**paired, **means, "label": label, "unit": unit}


def around(values) -> list[float]:
    spread = 2 * np.std(values) / np.sqrt(len(values))
    return [float(np.mean(values) - spread), float(np.mean(values) + spread)]


def answers(n: int, which: int) -> pd.DataFrame:
    """`n` answers like a real run's: long-tailed reasoning, some of it cut off by the token cap."""
    rng = np.random.default_rng(which)
    tokens = np.minimum(rng.lognormal(6.3 - 0.35 * which, 0.45, n).round(), CAP)
    stopped = (tokens < CAP).astype(float)
    correct = (rng.random(n) < 0.5 + 0.1 * which).astype(float)
    bullets = (rng.random(n) < 0.8 - 0.4 * which).astype(float)
    columns = {"correct": correct, "well_formed": stopped, "bullets": bullets, "stopped": stopped}
    return pd.DataFrame({**columns, "tokens": tokens, "reasoning_tokens": tokens})


def losses(n: int, which: int) -> pd.DataFrame:
    completion = np.random.default_rng(7).gamma(20, 0.07, n) * (1 - 0.18 * which)
    return pd.DataFrame({"completion": completion, "reasoning": 1.05 * completion, "response": 0.9 * completion})


def make_case(
    n_answers: int, n_rows: int, checkable: bool = True, null: bool = False
) -> tuple[Evaluation, Evaluation, dict]:
    """Both models and their metrics; `null`: fine-tuning changed nothing at all."""
    other = 0 if null else 1
    base = Evaluation({}, {}, answers(n_answers, 0), losses(n_rows, 0))
    tuned = Evaluation({}, {}, answers(n_answers, other), losses(n_rows, other))
    results = []
    for before, after, names in (
        (base.scored, tuned.scored, list(LABELS)[0 if checkable else 1 : 5]),
        (base.loss, tuned.loss, list(LABELS)[5:]),
    ):
        results += [result(name, before[name], after[name]) for name in names if len(before)]
    return base, tuned, {"primary": results[0], "secondary": results[1:]}


CASES = {
    "300 items": (300, 300),
    "nothing checkable": (60, 200, False),
    "a null run": (300, 300, True, True),
    "one row": (1, 1),
    "no losses": (40, 0),
}


def words_of(figure) -> dict[str, list]:
    """{text: boxes in pixels} of everything written in the figure."""
    figure.draw_without_rendering()
    unseen = set()  # matplotlib keeps labels of ticks beyond an axis's ends, and never draws them
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        unseen |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    found: dict[str, list] = {}
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible()):
        if text.get_text().strip() and text not in unseen:
            found.setdefault(text.get_text(), []).append(text.get_window_extent())
    return found


@pytest.mark.parametrize("case", CASES)
def test_no_words_overlap_or_leave_the_picture(case):
    figure = compose_comparison(*make_case(*CASES[case]))
    boxes = [(words, box) for words, found in words_of(figure).items() for box in found]
    width, height = figure.canvas.get_width_height()
    for words, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, words
    for (one, a), (other, b) in combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 1, (one, other)


def test_where_the_loss_decides_well_formed_answers_stand_beside_right_ones():
    base, tuned, metrics = make_case(60, 60)
    results = [metrics["primary"] | {"name": "multiple_choice"}, *metrics["secondary"]]
    loss = next(one for one in results if one["unit"] == "nats per token")
    metrics = {"primary": loss, "secondary": [one for one in results if one is not loss]}
    assert "Form and knowledge, 95 % intervals" in words_of(compose_comparison(base, tuned, metrics))


@pytest.mark.parametrize("case", CASES)
def test_a_picture_is_written_wide_enough_for_a_page(case, tmp_path):
    path = draw_comparison(*make_case(*CASES[case]), tmp_path / "comparison.png")
    with Image.open(path) as picture:
        assert picture.width >= 1200 and 0.6 < picture.height / picture.width < 1.2


def test_the_same_numbers_give_the_same_file(tmp_path):
    first, second = (draw_comparison(*make_case(30, 30), tmp_path / f"{i}.png").read_bytes() for i in range(2))
    assert first == second


def test_right_is_better_also_where_less_is_better():
    base, tuned = np.full(20, 0.0), np.array([1.0] * 15 + [0.0] * 5)
    good = build_rows({"primary": result("bullets", tuned, base), "secondary": [result("correct", base, tuned)]})
    bad = build_rows({"primary": result("bullets", base, tuned), "secondary": [result("correct", tuned, base)]})
    assert [row.change for row in good] == [75, 75] and [row.sign for row in good] == ["better"] * 2
    assert [row.change for row in bad] == [-75, -75] and [row.sign for row in bad] == ["worse"] * 2
    assert all(row.low <= row.change <= row.high for row in (*good, *bad))
    assert [row.label for row in good] == ["answers with bullets ↓", "multiple-choice accuracy"]


def test_what_is_no_share_is_drawn_in_percent_of_the_base():
    base = np.array([195.0, 205.0] * 25)
    (row,) = build_rows({"primary": result("reasoning_tokens", base, base / 2), "secondary": []})
    assert row.change == pytest.approx(50) and row.values == "200 → 100" and row.sign == "better"


def test_a_base_of_zero_has_no_percentage():
    metrics = {"primary": result("reasoning_tokens", [0.0, 0.0], [3.0, 4.0]), "secondary": []}
    (row,) = build_rows(metrics)
    assert row.change is None and row.sign == "cannot tell"
    models = [Evaluation({}, {}, answers(2, which), losses(0, which)) for which in (0, 1)]
    metrics["secondary"] = [result("well_formed", [0.0, 0.0], [1.0, 0.0])]
    assert "base is near 0: no % of it" in words_of(compose_comparison(*models, metrics))


def test_one_pair_is_never_called_better():
    """A bootstrap of one pair has an interval without width, which excludes zero."""
    (row,) = build_rows({"primary": result("correct", [0.0], [1.0]), "secondary": []})
    assert row.low > 0 and row.sign == "cannot tell"


def test_a_secondary_metric_is_coloured_by_the_p_value_that_the_table_shows():
    entry = result("correct", np.zeros(20), np.array([1.0] * 15 + [0.0] * 5))
    rows = build_rows({"primary": {**entry, "p_holm": None}, "secondary": [{**entry, "p_holm": 0.2}]})
    assert [row.sign for row in rows] == ["better", "cannot tell"]


def test_only_the_primary_metric_is_bold_and_it_stands_on_top():
    base, tuned, metrics = make_case(60, 60, checkable=False)
    primary = next(entry for entry in metrics["secondary"] if entry["name"] == "completion")
    metrics = {
        "primary": primary,
        "secondary": [metrics["primary"], *(e for e in metrics["secondary"] if e is not primary)],
    }
    figure = compose_comparison(base, tuned, metrics)
    figure.draw_without_rendering()
    labels = [
        text for axis in figure.findobj(lambda a: hasattr(a, "get_yticklabels")) for text in axis.get_yticklabels()
    ]
    bold = [text for text in labels if text.get_weight() == "bold"]
    assert [text.get_text() for text in bold] == ["held-out loss (nats per token) ↓"]
    rows = [text for text in labels if text.get_text().rstrip(" ↓") in {label for label, *_ in LABELS.values()}]
    assert bold[0].get_window_extent().y0 == max(text.get_window_extent().y0 for text in rows)


def test_the_token_cap_is_marked_where_it_cut_answers_off():
    base, tuned, metrics = make_case(300, 10)
    assert f"cap: {CAP} tokens " in words_of(compose_comparison(base, tuned, metrics))
    whole = [replace(one, scored=one.scored[one.scored["stopped"] == 1]) for one in (base, tuned)]
    assert not any("cap" in words or "cut off" in words for words in words_of(compose_comparison(*whole, metrics)))
