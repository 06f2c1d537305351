"""comparison/answers.html: every held-out question with its reference and both arms' answers, broken ones first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader

from utils.evaluation.answer_parsing import Completion, parse_completion
from utils.evaluation.questions import arm_digest, current_answers, load_questions, read_forced
from utils.files import write_text
from utils.pipeline.run_dir import RunDir

# (base right, fine-tuned right) -> outcome, in the order of the page: what fine-tuning cost comes first.
_OUTCOMES = {
    (True, False): "broken",
    (False, False): "both wrong",
    (False, True): "fixed",
    (True, True): "both right",
}
_NOT_CHECKABLE = "not checkable"
OUTCOMES = (*_OUTCOMES.values(), _NOT_CHECKABLE)
ANECDOTE = "anecdote"
_ARMS = ("baseline", "tuned")


@dataclass(frozen=True)
class Reply:
    """One arm's answer: taken apart, with what the scoring says about it in words, and the letter that was read.

    `forced` is the letter from the logits where a multiple-choice answer was cut off before it stated one.
    """

    arm: str
    completion: Completion
    reasoning_tokens: int
    marks: tuple[str, ...] = ()
    letter: str | None = None
    forced: str | None = None


@dataclass(frozen=True)
class Item:
    """One question of the page; `options` and `gold` belong to multiple choice, `reasoning` to the reference."""

    id: str
    kind: str
    question: str
    reference: str
    outcome: str
    replies: tuple[Reply, ...]
    reasoning: str = ""
    options: Mapping[str, str] | None = None
    gold: str | None = None


def write_answers(run: RunDir, arms) -> Path:
    """Render comparison/answers.html from the answers on file and their scores; one file that needs no script."""
    questions, held_out, benchmark = load_questions(run)
    answers = {
        arm: current_answers(run.file(f"{arm}/answers.jsonl"), questions, run.config.generate, arm_digest(run, arm))
        for arm in _ARMS
    }
    forced = {arm: read_forced(run.file(f"{arm}/forced.jsonl"), answers[arm], benchmark) for arm in _ARMS}
    items = _build_items(arms, answers, forced, held_out, benchmark)
    page = _template().render(
        items=items,
        anecdote=_build_anecdote(run, answers),
        outcomes=OUTCOMES,
        counts={outcome: sum(item.outcome == outcome for item in items) for outcome in OUTCOMES},
    )
    write_text(run.file("comparison/answers.html"), page)
    return run.file("comparison/answers.html")


def _template():
    templates = Environment(loader=PackageLoader("utils.report", "templates"), autoescape=True)
    return templates.get_template("answers.html.j2")


def _build_items(
    arms, answers: Mapping, forced: Mapping, held_out: pd.DataFrame, benchmark: pd.DataFrame | None
) -> list[Item]:
    """The scored questions, sorted by outcome; within one outcome they keep the order of the frames."""
    rows = held_out.set_index("id").to_dict("index")
    choices = {} if benchmark is None else {str(item["id"]): item for item in benchmark.to_dict("records")}
    items = []
    for scores in zip(arms.base.to_dict("records"), arms.tuned.to_dict("records"), strict=True):
        identifier, kind = scores[0]["id"], scores[0]["kind"]
        about = _about_choice(choices[identifier]) if kind == "choice" else _about_row(rows[identifier])
        replies = tuple(
            _reply(arm, answers[arm][identifier], score, forced[arm].get(identifier))
            for arm, score in zip(_ARMS, scores, strict=True)
        )
        items.append(Item(id=identifier, kind=kind, outcome=_outcome(*scores), replies=replies, **about))
    return sorted(items, key=lambda item: OUTCOMES.index(item.outcome))


def _about_choice(item: Mapping) -> dict:
    options, gold = item["options"], item["gold"]
    return {"question": item["question"], "reference": options[gold], "options": options, "gold": gold}


def _about_row(row: Mapping) -> dict:
    return {"question": row["Question"], "reference": row["Response"], "reasoning": row.get("Complex_CoT") or ""}


def _outcome(base: Mapping, tuned: Mapping) -> str:
    if pd.isna(base["correct"]) or pd.isna(tuned["correct"]):
        return _NOT_CHECKABLE
    return _OUTCOMES[bool(base["correct"]), bool(tuned["correct"])]


def _reply(arm: str, answer: Mapping, score: Mapping, forced: str | None) -> Reply:
    """What one arm said; `score` is its row of the scored frame."""
    marks = [] if pd.isna(score["correct"]) else ["right" if score["correct"] else "wrong"]
    if not score["stopped"]:
        marks.append("cut off")
    elif not score["well_formed"]:
        marks.append("not well-formed")
    if score["parsed"] == 0:
        marks.append("no explicit answer")
    letter = score.get("letter")  # a column of mixed kinds holds None or NaN for an answer in words
    return Reply(
        arm=arm,
        completion=parse_completion(answer["text"]),
        reasoning_tokens=int(score["reasoning_tokens"]),
        marks=tuple(marks),
        letter=letter if isinstance(letter, str) else None,
        forced=forced,
    )


def _build_anecdote(run: RunDir, answers: Mapping) -> Item | None:
    """The tutorials' own question, where this run asked it."""
    row = json.loads(run.file("data/anecdote.json").read_text(encoding="utf-8"))
    if not row:
        return None
    given = {arm: answers[arm][ANECDOTE] for arm in _ARMS if ANECDOTE in answers[arm]}
    replies = tuple(
        Reply(
            arm=arm,
            completion=parse_completion(answer["text"]),
            reasoning_tokens=answer["reasoning_tokens"],
            marks=() if answer["finish_reason"] == "stop" else ("cut off",),
        )
        for arm, answer in given.items()
    )
    return Item(id=ANECDOTE, kind=ANECDOTE, outcome=_NOT_CHECKABLE, replies=replies, **_about_row(row))
