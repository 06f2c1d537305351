"""comparison/answers.html: every held-out question with its reference and both models' answers, broken ones first."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader

from utils.evaluation.answer_parsing import parse_completion
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


def write_answers_page(run: RunDir, base: Evaluation, tuned: Evaluation) -> Path:
    """Render comparison/answers.html from both models' answers and their scores; one file that needs no script."""
    models, items = {"base": base, "tuned": tuned}, _build_items(run, base, tuned)
    templates = Environment(loader=PackageLoader("utils.report", "templates"), autoescape=True)
    page = templates.get_template("answers.html.j2").render(
        items=items,
        tutorial=_build_tutorial(load_tutorial_question(run), models),
        outcomes=OUTCOMES,
        counts={outcome: sum(item["outcome"] == outcome for item in items) for outcome in OUTCOMES},
    )
    write_text(run.file("comparison/answers.html"), page)
    return run.file("comparison/answers.html")


def _build_items(run: RunDir, base: Evaluation, tuned: Evaluation) -> list[dict]:
    """The scored questions as the template shows them, by outcome; within one they keep the order of the frames."""
    _, held_out, benchmark = load_questions(run)
    rows = held_out.set_index("id").to_dict("index")
    choices = {} if benchmark is None else {str(item["id"]): item for item in benchmark.to_dict("records")}
    items = []
    for before, after in zip(base.scored.to_dict("records"), tuned.scored.to_dict("records"), strict=True):
        known = not (pd.isna(before["correct"]) or pd.isna(after["correct"]))
        outcome = _OUTCOMES[bool(before["correct"]), bool(after["correct"])] if known else _NOT_CHECKABLE
        if before["kind"] == "choice":
            item = choices[before["id"]]
            options, gold = item["options"], item["gold"]
            about = {"question": item["question"], "reference": options[gold], "options": options, "gold": gold}
        else:
            about = _about_row(rows[before["id"]])
        replies = [_reply("base", base, before), _reply("tuned", tuned, after)]
        items.append({"id": before["id"], "outcome": outcome, "replies": replies, **about})
    return sorted(items, key=lambda item: OUTCOMES.index(item["outcome"]))


def _about_row(row: Mapping) -> dict:
    return {"question": row["Question"], "reference": row["Response"], "reasoning": row.get("Complex_CoT")}


def _reply(name: str, model: Evaluation, score: Mapping) -> dict:
    """What one model said; `letter` was read from the text, `forced` from the logits where it states none."""
    marks = [] if pd.isna(score["correct"]) else ["right" if score["correct"] else "wrong"]
    if not score["stopped"]:
        marks.append("cut off")
    elif not score["well_formed"]:
        marks.append("not well-formed")
    if score["parsed"] == 0:
        marks.append("no explicit answer")
    letter = score.get("letter")  # a column of mixed kinds holds None or NaN for an answer in words
    return {
        "model": name,
        "completion": parse_completion(model.answers[score["id"]]["text"]),
        "reasoning_tokens": int(score["reasoning_tokens"]),
        "marks": marks,
        "letter": letter if isinstance(letter, str) else None,
        "forced": model.forced.get(score["id"]),
    }


def _build_tutorial(row: Mapping, models: Mapping[str, Evaluation]) -> dict | None:
    """The tutorials' own question, where this run asked it."""
    if not row:
        return None
    replies = []
    for name, model in models.items():
        if answer := model.answers.get(TUTORIAL):
            marks = [] if answer["finish_reason"] == "stop" else ["cut off"]
            reply = {"completion": parse_completion(answer["text"]), "reasoning_tokens": answer["reasoning_tokens"]}
            replies.append({"model": name, "marks": marks, **reply})
    return {"replies": replies, **_about_row(row)}
