"""The frozen split: training, validation and held-out rows that share no question, not even in other words.

Rows that are near duplicates of each other or that the data's own `group` column joins are one group, and a group is never
in two parts. Near duplicates of a benchmark item and of the tutorials' example question are dropped.
"""

import hashlib
import math

import numpy as np
import pandas as pd

from utils.data.near_duplicates import Vectors, group_duplicates, largest_cosine, near_pairs, normalise, vectorise
from utils.data.prompts import TUTORIAL_QUESTION
from utils.data.rows import COLUMNS, check_rows, load_rows
from utils.data.synthetic import tuning_rows
from utils.errors import DataError
from utils.schema import Config, DataSection

_ANSWERS = ["Complex_CoT", "Response"]
_SAME_TEXT = 0.95  # at least this cosine: the tutorials' question itself, with a character more or less
_DUPLICATE = "same question as an earlier row"
_NEAR_ITEM = "near duplicate of a benchmark item"
_NEAR_TUTORIAL = "near duplicate of the tutorials' example question"
_TUTORIAL = "the tutorials' example question, kept to be shown"

# Positions of training, validation and held-out rows, and of excluded rows with the reason and the row that each is tied to
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, str, int]]]


def split_rows(
    config: Config, benchmark: pd.DataFrame | None = None, probed: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, dict]:
    """(train, validation, held-out, report), fixed by data.seed and the items; each frame has a `group`.

    Rows near an item are dropped, whether it is one of the `benchmark` or its letter alone is `probed`.
    Without data.validation_rows there are none; with them the same rows are held out as without. The report accounts for
    every row of the source: `train_rows`, `validation_rows`, `eval_rows`, each entry of `dropped` and `excluded`, and
    `not_drawn` (left over where data.train_rows asks for fewer) add up to `source_rows`. Raises DataError where more rows
    are asked for than there are, or more questions than held-out rows.
    """
    data, asked = config.data, config.evaluate.questions
    if asked is not None and asked > data.eval_rows:
        there = f"data.eval_rows holds out only {data.eval_rows} rows to ask; lower the one, or raise the other"
        raise DataError(f"evaluate.questions asks for {asked} answers in words, but {there}.")
    if probed is not None:
        benchmark = pd.concat([benchmark, probed], ignore_index=True).drop_duplicates("id")
    parts, found = _split_embedded(data) if config.embedded_data else _split_loaded(data, benchmark)
    train, validation, held_out = (part.reset_index(drop=True) for part in parts)
    if config.evaluate.primary == "accuracy" and ("answer" not in held_out or held_out["answer"].isna().any()):
        found = "evaluate.primary is accuracy, but not all held-out rows have choices, a list of texts, and an answer among them"
        raise DataError(f"{found}; take nll, or multiple_choice with a benchmark.")
    if data.shuffle_answers:  # a control that must come out worse: every question with another row's answer
        order = np.random.default_rng(data.seed).permutation(len(train))
        train.loc[order, _ANSWERS] = train.loc[np.roll(order, 1), _ANSWERS].to_numpy()
    report = {
        "source": "embedded synthetic data" if config.embedded_data else data.path.name if data.path else data.name,
        "revision": None if data.path else data.revision,
        "seed": data.seed,
        "train_rows": len(train),
        "validation_rows": len(validation),
        "eval_rows": len(held_out),
        "train_sha256": _digest(train),  # of the ids in order: splits with the same digests hold the same questions
        "eval_sha256": _digest(held_out),
        **{"dropped": [], "excluded": [], "contamination": {}, "tutorial_question": {}},
        **found,
    }
    return train, validation, held_out, report


def _digest(frame: pd.DataFrame) -> str:
    return hashlib.sha256("\n".join(frame["id"]).encode()).hexdigest()


def count_units(config: Config, held_out: pd.DataFrame, benchmark: pd.DataFrame | None) -> int:
    """How many independent units the primary metric rests on: rows or items of one group count once."""
    asked = held_out
    if config.evaluate.primary == "multiple_choice":
        asked = benchmark[benchmark["benchmark"] == benchmark["benchmark"].iloc[0]]
    elif config.evaluate.primary == "accuracy":
        asked = held_out.head(config.evaluate.questions or len(held_out))
    return asked["group" if "group" in asked else "id"].nunique()


def _split_embedded(data: DataSection) -> tuple[list[pd.DataFrame], dict]:
    """Rows from templates, which every two of them share: their rule keeps the parts apart, and nothing is measured."""
    parts, not_drawn = [check_rows(pd.DataFrame(tuning_rows("train", data.train_rows or 960)), "demo data")], 0
    for part, setting, asked in (
        ("validation", "validation_rows", data.validation_rows or 0),
        ("test", "eval_rows", data.eval_rows),
    ):
        pool = check_rows(pd.DataFrame(tuning_rows(part)), "demo data")
        _require_rows(setting, asked, len(pool))
        parts.append(pool.head(asked))
        not_drawn += len(pool) - asked if asked else 0
    return parts, {
        "rule": "written from templates by rule: the questions of two parts share no triple of findings, so near "
        "duplicates are not looked for",
        "source_rows": sum(map(len, parts)) + not_drawn,
        "not_drawn": not_drawn,
    }


def _split_loaded(data: DataSection, benchmark: pd.DataFrame | None) -> tuple[list[pd.DataFrame], dict]:
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
    if not len(kept):
        raise DataError(f"All {source_rows} rows repeat a benchmark item or the tutorials' question; give other rows.")
    item_vectors = vectors.take(np.arange(len(rows), len(rows) + len(stems)))
    rows, vectors = rows.iloc[kept].reset_index(drop=True), vectors.take(kept)
    rows["group"] = _group(rows, vectors, data.duplicate_threshold)
    groups = pd.factorize(rows["group"])[0]
    *parts, excluded = _draw(groups, data, np.random.default_rng(data.seed))
    seen = np.concatenate(parts[:2])  # by which training may be decided
    found = {
        "source_rows": source_rows,
        "not_drawn": source_rows - len(dropped) - len(excluded) - sum(map(len, parts)),
        "dropped": dropped,
        "excluded": [
            {"id": rows["id"][i], "row": int(rows["row"][i]), "reason": reason, "near": rows["id"][other]}
            for i, reason, other in excluded
        ],
        "contamination": {
            "threshold": data.duplicate_threshold,
            "largest_group": int(rows["group"].value_counts().max()),
            "near_benchmark": sum(entry["reason"] == _NEAR_ITEM for entry in dropped),
            "largest_cosine_train_eval": _round_down(largest_cosine(vectors.take(parts[2]), vectors.take(seen))),
            "largest_cosine_train_benchmark": _round_down(largest_cosine(item_vectors, vectors.take(seen))),
        },
        "tutorial_question": tutorial,
    }
    return [rows.iloc[places].drop(columns="row") for places in parts], found


def _drop_near(
    rows: pd.DataFrame, vectors: Vectors, benchmark: pd.DataFrame | None, stems: list[str], threshold: float
) -> tuple[np.ndarray, list[dict], dict]:
    """(positions of rows far from all items and the tutorials' question, entries of the others, the tutorials' row).

    `vectors` are those of the rows, then the stems, then the tutorials' question.
    """
    count, near = len(rows), {}
    if threshold < 1:
        fixed = vectors.take(np.arange(count, len(vectors.lengths)))
        pairs = near_pairs(vectors.take(np.arange(count)), fixed, threshold).sort_values("cosine", kind="stable")
        near = {row: (other, cosine) for row, other, cosine in pairs.itertuples(index=False)}  # the nearest comes last
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


def _group(rows: pd.DataFrame, vectors: Vectors, threshold: float) -> pd.Series:
    """The name of each row's group: near duplicates, and rows of one `group` of the data's own, share one."""
    own = rows["group"] if "group" in rows.columns else pd.Series([None] * len(rows))
    positions = pd.Series(np.arange(len(rows)))
    first = positions.groupby(own).transform("first")
    links = [(first[own.notna()], positions[own.notna()])]
    if threshold < 1:
        pairs = near_pairs(vectors, threshold=threshold)
        links.append((pairs.left, pairs.right))
    joined = group_duplicates(len(rows), *links)
    named = own.groupby(joined).transform("first")
    return named.where(named.notna(), rows["id"].groupby(joined).transform("first"))


def _draw(groups: np.ndarray, data: DataSection, rng: np.random.Generator) -> Drawn:
    """Held-out rows, then validation rows, are taken from the groups in shuffled order; the other groups train."""
    _require_rows("eval_rows", data.eval_rows, len(groups) - 1)
    order = rng.permutation(len(groups))
    members = pd.Series(order).groupby(groups[order], sort=False).agg(list).to_dict()
    held_out, excluded = _take_groups(members, data.eval_rows, "eval_rows", "held-out")
    _require_rows("validation_rows", data.validation_rows or 0, sum(map(len, members.values())) - 1)
    validation, more = _take_groups(members, data.validation_rows or 0, "validation_rows", "validation")
    train = [position for position in order if groups[position] in members]
    if not train:
        asked = f"data.eval_rows={data.eval_rows} and data.validation_rows={data.validation_rows or 0}"
        left = "leave no row to train on that is not a near duplicate of theirs"
        raise DataError(f"{asked} {left}; lower them, raise data.duplicate_threshold, or give more data.")
    return np.array(train[: data.train_rows]), np.array(validation, dtype=int), np.array(held_out), excluded + more


def _take_groups(
    members: dict[int, list[int]], count: int, setting: str, part: str
) -> tuple[list[int], list[tuple[int, str, int]]]:
    """(`count` positions, excluded rows): whole groups while they fit, then a part of the smallest other; its rest goes nowhere.

    What is taken leaves `members`, {group: its positions}.
    """
    taken: list[int] = []
    for group, positions in list(members.items()):
        if len(taken) + len(positions) <= count:
            taken += members.pop(group)
    missing = count - len(taken)
    if not missing:
        return taken, []
    divided = members.pop(min(members, key=lambda group: len(members[group])))
    reason = f"shares a group with a {part} row, and data.{setting} is met without it"
    return taken + divided[:missing], [(position, reason, divided[0]) for position in divided[missing:]]


def _require_rows(setting: str, asked: int, found: int) -> None:
    if asked > max(found, 0):
        what = {"eval_rows": "held-out", "validation_rows": "validation"}[setting]
        there = f"only {max(found, 0)} can be held out"
        raise DataError(f"data.{setting} asks for {asked} {what} rows, but {there}; lower it, or give more data.")


def _round_down(cosine: float | None) -> float | None:
    return None if cosine is None else math.floor(10_000 * float(cosine)) / 10_000  # what is below 0.5 stays so
