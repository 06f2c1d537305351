"""comparison/answers.html: every held-out question with its reference and both models' answers, broken ones first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader

from utils.evaluation.answer_parsing import Completion, parse_completion
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.questions import TUTORIAL, load_questions, load_tutorial_question
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


@dataclass(frozen=True)
class Reply:
    """One model's answer: taken apart, with what the scoring says about it in words, and the letter that was read.

    `forced` is the letter from the logits where a multiple-choice answer was cut off before it stated one.
    """

    model: str  # base or tuned
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


def write_answers_page(run: RunDir, base: Evaluation, tuned: Evaluation) -> Path:
    """Render comparison/answers.html from both models' answers and their scores; one file that needs no script."""
    _, held_out, benchmark = load_questions(run)
    models = {"base": base, "tuned": tuned}
    items = _build_items(models, held_out, benchmark)
    templates = Environment(loader=PackageLoader("utils.report", "templates"), autoescape=True)
    page = templates.get_template("answers.html.j2").render(
        items=items,
        tutorial=_build_tutorial(load_tutorial_question(run), models),
        outcomes=OUTCOMES,
        counts={outcome: sum(item.outcome == outcome for item in items) for outcome in OUTCOMES},
    )
    write_text(run.file("comparison/answers.html"), page)
    return run.file("comparison/answers.html")


def _build_items(
    models: Mapping[str, Evaluation], held_out: pd.DataFrame, benchmark: pd.DataFrame | None
) -> list[Item]:
    """The scored questions, sorted by outcome; within one outcome they keep the order of the frames."""
    rows = held_out.set_index("id").to_dict("index")
    choices = {} if benchmark is None else {str(item["id"]): item for item in benchmark.to_dict("records")}
    items = []
    for scores in zip(*(model.scored.to_dict("records") for model in models.values()), strict=True):
        identifier, kind = scores[0]["id"], scores[0]["kind"]
        about = _about_choice(choices[identifier]) if kind == "choice" else _about_row(rows[identifier])
        replies = tuple(_reply(name, models[name], score) for name, score in zip(models, scores, strict=True))
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


def _reply(name: str, model: Evaluation, score: Mapping) -> Reply:
    """What one model said; `score` is its row of the scored frame."""
    marks = [] if pd.isna(score["correct"]) else ["right" if score["correct"] else "wrong"]
    if not score["stopped"]:
        marks.append("cut off")
    elif not score["well_formed"]:
        marks.append("not well-formed")
    if score["parsed"] == 0:
        marks.append("no explicit answer")
    letter = score.get("letter")  # a column of mixed kinds holds None or NaN for an answer in words
    return Reply(
        model=name,
        completion=parse_completion(model.answers[score["id"]]["text"]),
        reasoning_tokens=int(score["reasoning_tokens"]),
        marks=tuple(marks),
        letter=letter if isinstance(letter, str) else None,
        forced=model.forced.get(score["id"]),
    )


def _build_tutorial(row: Mapping, models: Mapping[str, Evaluation]) -> Item | None:
    """The tutorials' own question, where this run asked it."""
    if not row:
        return None
    replies = []
    for name, model in models.items():
        if answer := model.answers.get(TUTORIAL):
            marks = () if answer["finish_reason"] == "stop" else ("cut off",)
            replies.append(Reply(name, parse_completion(answer["text"]), answer["reasoning_tokens"], marks))
    return Item(id=TUTORIAL, kind=TUTORIAL, outcome=_NOT_CHECKABLE, replies=tuple(replies), **_about_row(row))
