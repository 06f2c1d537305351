"""Blind ratings: which pairs of answers comparison/rate.html shows and in which order, and what a reader's choices say.

The order rests on a secret in comparison/rating_key.json. Neither the page nor the file that it saves can undo it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Literal

import numpy as np
from pydantic import BaseModel, ValidationError
from scipy.stats import binomtest

from utils.errors import DataError
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.questions import Model
from utils.evaluation.statistics import ALPHA, Verdict, show_p, wilson_interval
from utils.files import digest_of, write_json
from utils.pipeline.run_dir import RunDir

_PAIRS = 100  # at most: more than this nobody rates
_CLAIM = {"claim": "preferred by a reader", "metric": None}
_KEY, _RATINGS = "comparison/rating_key.json", "comparison/ratings.json"


@dataclass(frozen=True)
class Pair:
    """Both models' answers to one question, in the order in which a reader sees them."""

    id: str
    models: tuple[Model, Model]
    texts: tuple[str, str]


class _Rating(BaseModel, extra="forbid", strict=True):
    pair: str
    choice: Literal["1", "2", "equal", "both bad"]


class _Ratings(BaseModel, extra="forbid", strict=True):
    """The file that the page saves."""

    page: str  # `digest_pairs` of what the reader saw
    ratings: list[_Rating]


def draw_pairs(run: RunDir, base: Evaluation, tuned: Evaluation) -> list[Pair]:
    """At most 100 pairs in a random order, each model first in half of them; the same ones as long as the key is kept.

    Open questions, or the multiple choice where there are no others; one of each group, so that pairs are independent.
    """
    key = run.file(_KEY)
    if not key.exists():
        write_json(key, {"seed": token_hex(16)})
    rng = np.random.default_rng(list(key.read_bytes()))
    is_open = base.scored["kind"] == "open"
    asked = base.scored[is_open] if is_open.any() else base.scored
    chosen = asked.iloc[rng.permutation(len(asked))].drop_duplicates("group").head(_PAIRS)["id"]
    pairs = []
    for name, swapped in zip(chosen, rng.permutation(len(chosen)) % 2, strict=True):
        models, texts = ("base", "tuned"), (base.answers[name]["text"], tuned.answers[name]["text"])
        pairs.append(Pair(name, models[::-1], texts[::-1]) if swapped else Pair(name, models, texts))
    return pairs


def digest_pairs(pairs: Sequence[Pair]) -> str:
    """What ties a reader's ratings to exactly these answers in this order; it says nothing of whose they are."""
    return digest_of([(pair.id, pair.texts) for pair in pairs])


def keep_ratings(run: RunDir, base: Evaluation, tuned: Evaluation, file: Path) -> None:
    """Copy a reader's ratings to comparison/ratings.json, from where every later comparison takes them.

    Raises DataError where they are no ratings of this run's comparison/rate.html.
    """
    ratings = _read_ratings(file, draw_pairs(run, base, tuned))
    write_json(run.file(_RATINGS), ratings.model_dump())


def state_preference(run: RunDir, base: Evaluation, tuned: Evaluation) -> list[dict]:
    """The claim that the kept ratings carry; none where there are none, or answers have changed since."""
    file = run.file(_RATINGS)
    if not file.exists():
        return []
    pairs = draw_pairs(run, base, tuned)
    try:
        ratings = _read_ratings(file, pairs).ratings
    except DataError as error:  # new answers must not fail over old ratings
        print(f"No reader's preference is stated: {error}")
        return []
    models = {pair.id: dict(zip("12", pair.models, strict=True)) for pair in pairs}
    counts = Counter(models[rating.pair].get(rating.choice, rating.choice) for rating in ratings)
    return [_conclude(counts, len(pairs))]


def _read_ratings(file: Path, pairs: Sequence[Pair]) -> _Ratings:
    again = "save the ratings again in this run's comparison/rate.html"
    try:
        read = _Ratings.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); {again}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{file} is not what comparison/rate.html saves ({place}: {first['msg']}); {again}.") from None
    if read.page != (expected := digest_pairs(pairs)):
        raise DataError(f"{file} rates other answers than this run's (page {read.page}, not {expected}); {again}.")
    known = {pair.id for pair in pairs}
    for name, count in Counter(rating.pair for rating in read.ratings).items():
        if name not in known or count > 1:
            found = f"{count} times, not once" if name in known else f"which is none of the {len(pairs)} pairs"
            raise DataError(f"{file} rates {name!r}, {found}; {again}.")
    return read


def _conclude(counts: Counter[str], pairs: int) -> dict:
    """By the exact binomial test over the decided pairs: with no preference, either answer is taken half of the time."""
    won, n = counts["tuned"], counts["tuned"] + counts["base"]
    rest = f"{counts['equal']} equal, {counts['both bad']} both bad, {pairs - counts.total()} of {pairs} not rated"
    if not n:
        sentence = f"A reader preferred neither model's answer in any pair ({rest})."
        nothing = {"n": 0, "share": None, "ci95": [0.0, 1.0], "p_value": 1.0}
        return _CLAIM | {"sentence": sentence, "verdict": "cannot tell"} | nothing
    p, (low, high) = float(binomtest(won, n).pvalue), wilson_interval(won, n)
    found: Verdict = "cannot tell"
    if p < ALPHA and not low <= 0.5 <= high:
        found = "better" if won > n / 2 else "worse"
    sentence = (
        f"A reader, not told which was which, preferred the fine-tuned model's answer in {won} of {n} decided pairs "
        f"({rest}): {won / n:.1%} (95 % interval {low:.1%} to {high:.1%}), p {'' if p < 0.001 else '= '}{show_p(p)}."
    )
    figures = {"n": n, "share": won / n, "ci95": [low, high], "p_value": p}
    return _CLAIM | {"sentence": sentence, "verdict": found} | figures
