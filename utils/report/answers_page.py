"""The pages of answers: comparison/answers.html shows all with their scores, comparison/rate.html some without names."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader

from utils.evaluation.answer_parsing import parse_completion
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.questions import TUTORIAL, load_questions, load_tutorial_question
from utils.evaluation.rating import digest_pairs, draw_pairs, state_preference
from utils.files import write_json, write_text
from utils.pipeline.run_dir import RunDir

# (base right, fine-tuned right) -> outcome, in the order of the page: what fine-tuning cost comes first.
_OUTCOMES = {(True, False): "broken", (False, False): "both wrong", (False, True): "fixed", (True, True): "both right"}
_TEMPLATES = Environment(loader=PackageLoader("utils.report", "templates"), autoescape=True)
_NOT_CHECKABLE = "not checkable"
OUTCOMES = (*_OUTCOMES.values(), _NOT_CHECKABLE)


def write_answers_page(run: RunDir, base: Evaluation, tuned: Evaluation) -> Path:
    """Render comparison/answers.html from both models' answers and their scores; one file that needs no script."""
    models, items = {"base": base, "tuned": tuned}, _build_items(run, base, tuned)
    page = _TEMPLATES.get_template("answers.html.j2").render(
        items=items,
        tutorial=_build_tutorial(load_tutorial_question(run), models),
        outcomes=OUTCOMES,
        counts={outcome: sum(item["outcome"] == outcome for item in items) for outcome in OUTCOMES},
    )
    return write_text(run.file("comparison/answers.html"), page)


def write_rating_page(run: RunDir, base: Evaluation, tuned: Evaluation) -> Path:
    """Render comparison/rate.html, one file that works offline; `python -m utils score --ratings` takes what it saves.

    What kept ratings say goes to comparison/preference.json: beside metrics.json, which the exports rest on.
    """
    pairs, about = draw_pairs(run, base, tuned), _describe_questions(run)
    items = [{**about[pair.id], "id": pair.id, "replies": map(parse_completion, pair.texts)} for pair in pairs]
    # The nonce lets the page's own script run and no other: no answer can hold a digest of itself.
    text = _TEMPLATES.get_template("rate.html.j2").render(items=items, nonce=digest_pairs(pairs))
    write_json(run.file("comparison/preference.json"), state_preference(run, base, tuned))
    return write_text(run.file("comparison/rate.html"), text)


def _build_items(run: RunDir, base: Evaluation, tuned: Evaluation) -> list[dict]:
    """The scored questions as the template shows them, by outcome; within one they keep the order of the frames."""
    about, items = _describe_questions(run), []
    for before, after in zip(base.scored.to_dict("records"), tuned.scored.to_dict("records"), strict=True):
        known = not (pd.isna(before["correct"]) or pd.isna(after["correct"]))
        outcome = _OUTCOMES[bool(before["correct"]), bool(after["correct"])] if known else _NOT_CHECKABLE
        replies = [_reply("base", base, before), _reply("tuned", tuned, after)]
        items.append({"id": before["id"], "outcome": outcome, "replies": replies, **about[before["id"]]})
    return sorted(items, key=lambda item: OUTCOMES.index(item["outcome"]))


def _describe_questions(run: RunDir) -> dict[str, dict]:
    """{id: question and reference, and of multiple choice options and gold} of all that is scored."""
    _, held_out, benchmark = load_questions(run)
    about = {row["id"]: _about_row(row) for row in held_out.to_dict("records")}
    for item in [] if benchmark is None else benchmark.to_dict("records"):
        known = {key: item[key] for key in ("question", "options", "gold")}
        about[str(item["id"])] = {**known, "reference": item["options"][item["gold"]]}
    return about


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
