"""The frozen split: training and held-out rows that share no question, not even in other words.

Rows that are near duplicates of each other or that the data's own `group` column joins are one group, and a group is never
on both sides. Near duplicates of a benchmark item and of the tutorials' example question are dropped.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pandas as pd

from utils.data.near_duplicates import (
    Vectors,
    group_duplicates,
    largest_cosine,
    near_pairs,
    normalise,
    vectorise,
)
from utils.data.rows import COLUMNS, check_rows, load_rows
from utils.data.synthetic import tuning_rows
from utils.errors import DataError
from utils.schema import Config, DataSection

# The one question by which the tutorials judge the model; it is a row of the file that they train on, at no fixed place
TUTORIAL_QUESTION = (
    "A 61-year-old woman with a long history of involuntary urine loss during activities like coughing or sneezing but "
    "no leakage at night undergoes a gynecological exam and Q-tip test. Based on these findings, what would cystometry "
    "most likely reveal about her residual volume and detrusor contractions?"
)
_SAME_TEXT = 0.95  # at least this cosine: the tutorials' question itself, with a character more or less
_DUPLICATE = "same question as an earlier row"
_NEAR_ITEM = "near duplicate of a benchmark item"
_NEAR_TUTORIAL = "near duplicate of the tutorials' example question"
_TUTORIAL = "the tutorials' example question, kept to be shown"

Excluded = list[tuple[int, str, int]]  # position of a row, reason, position of the row that it is tied to


def split_rows(config: Config, benchmark: pd.DataFrame | None = None) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """(train, held-out, report), fixed by data.seed and the benchmark's items; both frames have a `group` column.

    The report accounts for every row of the source: `train_rows`, `eval_rows`, each entry of `dropped` and `excluded`,
    and `not_drawn` (left over where data.train_rows asks for fewer) add up to `source_rows`. Its `contamination` holds
    what was looked for and the largest cosines that are left; its `tutorial_question` is the tutorials' row, or empty.

    Raises DataError where more held-out rows are asked for than there are, or more questions than held-out rows.
    """
    data, asked = config.data, config.evaluate.questions
    if asked is not None and asked > data.eval_rows:
        raise DataError(
            f"evaluate.questions asks for {asked} answers in words, but data.eval_rows holds out only {data.eval_rows} "
            "rows to ask; lower the one, or raise the other."
        )
    train, held_out, found = _split_embedded(data) if config.embedded_data else _split_loaded(data, benchmark)
    if config.evaluate.primary == "accuracy" and not {"answer", "choices"} <= set(held_out.columns):
        raise DataError(
            "evaluate.primary is accuracy, but the rows have no answer and choices that a rule can check; "
            "take nll, or multiple_choice with a benchmark."
        )
    if data.shuffle_answers:
        train = _shuffle_answers(train, data.seed)
    report = {
        "source": "embedded synthetic data" if config.embedded_data else str(data.path or data.name),
        "revision": data.revision,
        "seed": data.seed,
        "train_rows": len(train),
        "train_rows_asked_for": data.train_rows,
        "eval_rows": len(held_out),
        "train_sha256": ids_digest(train),
        "eval_sha256": ids_digest(held_out),
        "benchmark_commits": {s.name: s.revision for s in config.evaluate.benchmarks if s.path is None},
        **found,
    }
    return train.reset_index(drop=True), held_out.reset_index(drop=True), report


def ids_digest(frame: pd.DataFrame) -> str:
    """sha256 over the rows' ids in order: two splits with the same digest hold the same questions."""
    return hashlib.sha256("\n".join(frame["id"]).encode()).hexdigest()


def count_units(config: Config, held_out: pd.DataFrame, benchmark: pd.DataFrame | None) -> int:
    """How many independent units the primary metric rests on: rows or items of one group count once."""
    asked = held_out
    if config.evaluate.primary == "multiple_choice":
        asked = benchmark[benchmark["benchmark"] == benchmark["benchmark"].iloc[0]]
    elif config.evaluate.primary == "accuracy":
        asked = held_out.head(config.evaluate.questions or len(held_out))
    return asked["group" if "group" in asked else "id"].nunique()


def _shuffle_answers(train: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A control that must come out worse: every question with the reasoning and the response of another row."""
    order = np.random.default_rng(seed).permutation(len(train))
    answers = ["Complex_CoT", "Response"]
    swapped = train.reset_index(drop=True)
    swapped.loc[order, answers] = swapped.loc[np.roll(order, 1), answers].to_numpy()
    return swapped


def _split_embedded(data: DataSection) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Rows from templates, which every two of them share: their rule keeps both parts apart, and nothing is measured."""
    train = check_rows(pd.DataFrame(tuning_rows("train", data.train_rows or 960)), "demo data")
    pool = check_rows(pd.DataFrame(tuning_rows("test")), "demo data")
    _require_rows(data.eval_rows, len(pool))
    held_out = pool.head(data.eval_rows)
    found = {
        "rule": "written from templates by rule: training and held-out questions share no triple of findings, so near "
        "duplicates are not looked for",
        "source_rows": len(train) + len(pool),
        "not_drawn": len(pool) - len(held_out),
        "dropped": [],
        "excluded": [],
        "contamination": {},
        "tutorial_question": {},
    }
    return train, held_out, found


def _split_loaded(data: DataSection, benchmark: pd.DataFrame | None) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    rows, dropped = load_rows(data)
    source_rows = len(rows) + len(dropped)
    again = rows["id"].duplicated()
    dropped += [
        {"id": row.id, "row": row.row, "reason": _DUPLICATE, "near": row.id, "cosine": 1.0}
        for row in rows[again].itertuples()
    ]
    rows = rows[~again].reset_index(drop=True)
    stems = [] if benchmark is None else list(benchmark["stem"])
    vectors = vectorise([*rows["Question"], *stems, TUTORIAL_QUESTION])
    kept, entries, tutorial = _drop_near(rows, vectors, benchmark, stems, data.duplicate_threshold)
    dropped += entries
    item_vectors = vectors.take(np.arange(len(rows), len(rows) + len(stems)))
    rows, vectors = rows.iloc[kept].reset_index(drop=True), vectors.take(kept)
    rows["group"], duplicates = _group(rows, vectors, data.duplicate_threshold)

    groups = pd.factorize(rows["group"])[0]
    divide = _draw_shuffled if data.shuffle else _draw_after_first
    train, held_out, excluded = divide(groups, data, np.random.default_rng(data.seed))
    sizes = np.bincount(duplicates)
    train_vectors = vectors.take(train)
    found = {
        "source_rows": source_rows,
        "not_drawn": source_rows - len(dropped) - len(excluded) - len(train) - len(held_out),
        "dropped": dropped,
        "excluded": [
            {"id": rows["id"][i], "row": int(rows["row"][i]), "reason": reason, "near": rows["id"][other]}
            for i, reason, other in excluded
        ],
        "contamination": {
            "threshold": data.duplicate_threshold,
            "exact_duplicates": int(again.sum()),
            "near_duplicate_groups": int((sizes > 1).sum()),
            "largest_group": int(sizes.max()) if len(sizes) else 0,
            "rows_in_groups": int(sizes[sizes > 1].sum()),
            "near_benchmark": sum(entry["reason"] == _NEAR_ITEM for entry in dropped),
            "largest_cosine_train_eval": _round_down(largest_cosine(vectors.take(held_out), train_vectors)),
            "largest_cosine_train_benchmark": _round_down(largest_cosine(item_vectors, train_vectors)),
            "tutorial_question_found": bool(tutorial),
        },
        "tutorial_question": tutorial,
    }
    train, held_out = (rows.iloc[places].drop(columns="row") for places in (train, held_out))
    return train, held_out, found


def _drop_near(
    rows: pd.DataFrame, vectors: Vectors, benchmark: pd.DataFrame | None, stems: list[str], threshold: float
) -> tuple[np.ndarray, list[dict], dict]:
    """Positions of the rows that are far enough from all items and from the tutorials' question; entries; the tutorials' row.

    `vectors` are those of the rows, then the stems, then the tutorials' question.
    """
    count, near = len(rows), {}
    if threshold < 1:
        fixed = vectors.take(np.arange(count, len(vectors.lengths)))
        near = near_pairs(vectors.take(np.arange(count)), fixed, threshold).best_for_left()
    places = {normalise(text): place for place, text in enumerate([*stems, TUTORIAL_QUESTION])}
    for position, text in enumerate(map(normalise, rows["Question"])):
        if text in places:  # two texts of the same words need not have a cosine of 1
            near[position] = (places[text], 1.0)
    dropped, tutorial = [], {}
    for position, (other, cosine) in sorted(near.items()):
        row = rows.iloc[position]
        entry = {"id": row["id"], "row": int(row["row"]), "reason": _NEAR_TUTORIAL, "cosine": _round_down(cosine)}
        if other < len(stems):
            entry |= {"reason": _NEAR_ITEM, "near": str(benchmark["id"].iloc[other])}
        elif cosine >= _SAME_TEXT:
            entry["reason"] = _TUTORIAL
            tutorial = tutorial or {key: row[key] for key in ("id", *COLUMNS)}
        dropped.append(entry)
    return np.setdiff1d(np.arange(count), list(near)), dropped, tutorial


def _group(rows: pd.DataFrame, vectors: Vectors, threshold: float) -> tuple[list[str], np.ndarray]:
    """(names, near-duplicate group numbers): a name joins near duplicates and rows of one `group` of the data's own.

    It is the first such group's name, or the first row's id.
    """
    links: list = [(np.empty(0), np.empty(0))]
    if threshold < 1:
        pairs = near_pairs(vectors, threshold=threshold)
        links.append((pairs.left, pairs.right))
    own = rows["group"] if "group" in rows.columns else pd.Series([None] * len(rows))
    first: dict[str, int] = {}
    same = [(first.setdefault(name, i), i) for i, name in enumerate(own) if isinstance(name, str)]
    joined = group_duplicates(len(rows), *links, tuple(zip(*same, strict=True)) if same else ([], []))
    names: dict[int, str] = {}
    for number, name in [*zip(joined, own, strict=True), *zip(joined, rows["id"], strict=True)]:
        if isinstance(name, str):
            names.setdefault(number, name)
    return [names[number] for number in joined], group_duplicates(len(rows), *links)


def _draw_shuffled(
    groups: np.ndarray, data: DataSection, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, Excluded]:
    """(train, held out, excluded): whole groups are held out in shuffled order while they fit; of the rows then missing, a
    part of the smallest other group makes up the number, and its other rows go nowhere."""
    _require_rows(data.eval_rows, len(groups) - 1)
    order = rng.permutation(len(groups))
    members: dict[int, list[int]] = {}
    for position in order:
        members.setdefault(int(groups[position]), []).append(int(position))
    held_out: list[int] = []
    passed = []
    for positions in members.values():
        if len(held_out) + len(positions) <= data.eval_rows:
            held_out += positions
        else:
            passed.append(positions)
    excluded: Excluded = []
    if missing := data.eval_rows - len(held_out):
        divided = min(passed, key=len)
        held_out += divided[:missing]
        reason = "shares a group with a held-out row, and data.eval_rows is met without it"
        excluded = [(position, reason, divided[0]) for position in divided[missing:]]
    away = {*held_out, *(entry[0] for entry in excluded)}
    train = [position for position in order if position not in away]
    if not train:
        raise DataError(
            f"data.eval_rows asks for {data.eval_rows} held-out rows, but none is left to train on that is not a near "
            "duplicate of them; lower it, raise data.duplicate_threshold, or give more data."
        )
    return np.array(train[: data.train_rows]), np.array(held_out), excluded


def _draw_after_first(
    groups: np.ndarray, data: DataSection, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, Excluded]:
    """(train, held out, excluded): the first rows train; held out are rows behind them that share no group with them."""
    first, count = data.train_rows, len(groups)
    if first is None or first >= count:
        raise DataError(
            f"data.shuffle is off, so the first data.train_rows rows train: that is {first}, of {count} rows, and some must be "
            "held out; give a lower number."
        )
    first_of_group = pd.Series(np.arange(count)).groupby(groups).transform("min").to_numpy()
    behind = np.arange(first, count)
    free = behind[first_of_group[behind] >= first]
    _require_rows(data.eval_rows, len(free))
    reason = "shares a group with a training row"
    excluded = [(int(i), reason, int(first_of_group[i])) for i in behind if first_of_group[i] < first]
    return np.arange(first), rng.permutation(free)[: data.eval_rows], excluded


def _require_rows(asked: int, found: int) -> None:
    if asked > found:
        raise DataError(
            f"data.eval_rows asks for {asked} held-out rows, but only {max(found, 0)} can be held out; "
            "lower it, or give more data."
        )


def _round_down(cosine: float | None) -> float | None:
    return None if cosine is None else math.floor(10_000 * float(cosine)) / 10_000  # what is below 0.5 stays so
