"""What both models are asked, and the answers on file: pure, so that scores can be recomputed without a model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from utils.data.prompts import format_multiple_choice, format_prompt
from utils.data.rows import read_benchmark
from utils.errors import DataError, StageOrderError
from utils.evaluation.metrics import needs_forcing
from utils.files import digests, parse_json, read_lines, write_json
from utils.pipeline.run_dir import RunDir
from utils.pipeline.stages import BY_NAME
from utils.schema import Config, GenerateSection

Model = Literal["base", "tuned"]
FOLDERS: dict[Model, str] = {"base": "baseline", "tuned": "tuned"}  # where a model's files lie in the run directory
TUTORIAL = "anecdote"  # id and kind of the tutorials' own question, as saved answers have it
# What answers and losses are held against; a group is what counts as one independent unit.
_REFERENCES = ("id", "group", "Question", "Complex_CoT", "Response", "answer", "choices")
_RIGHT_LETTERS = ("id", "group", "benchmark", "gold")


@dataclass(frozen=True)
class Question:
    """One thing to answer: `kind` is `open` (in words), `choice` (a letter), or TUTORIAL (shown and never scored).

    `prompt` is the whole model input.
    """

    id: str
    kind: str
    prompt: str


def build_questions(
    config: Config, held_out: pd.DataFrame, benchmark: pd.DataFrame | None, tutorial_question: dict | None = None
) -> list[Question]:
    """The held-out questions (as many as evaluate.questions), the benchmarks' items, and the tutorials' question if any."""
    style = config.prompt
    rows = held_out if config.evaluate.questions is None else held_out.head(config.evaluate.questions)
    questions = [Question(row.id, "open", format_prompt(row.Question, style)) for row in rows.itertuples()]
    for item in benchmark.itertuples() if benchmark is not None else ():
        text = format_multiple_choice(item.question, item.options)
        questions.append(Question(str(item.id), "choice", format_prompt(text, style)))
    if tutorial_question:
        questions.append(Question(TUTORIAL, TUTORIAL, format_prompt(tutorial_question["Question"], style)))
    twice = [i for i, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise DataError(f"The id {twice[0]} belongs to two questions; every row and item needs an id of its own.")
    return questions


def load_questions(run: RunDir) -> tuple[list[Question], pd.DataFrame, pd.DataFrame | None]:
    """(questions, held-out rows, benchmark items): what 00 froze in the run directory, as both models are asked it."""
    held_out = pd.read_parquet(run.file("data/eval.parquet"))
    benchmark = read_benchmark(run.file("data"))
    return build_questions(run.config, held_out, benchmark, load_tutorial_question(run)), held_out, benchmark


def load_tutorial_question(run: RunDir) -> dict:
    """The row by which the tutorials judge, kept out of training; empty where the data have no such row."""
    return json.loads(run.file("data/anecdote.json").read_text(encoding="utf-8"))


def collect_references(held_out: pd.DataFrame, benchmark: pd.DataFrame | None) -> list[str]:
    """What answers and losses are held against, as JSON texts: the held-out rows and the right letters, each by id."""
    known = ((held_out, _REFERENCES), (benchmark, _RIGHT_LETTERS))
    return [
        frame[[column for column in columns if column in frame]].sort_values("id").to_json(orient="records")
        for frame, columns in known
        if frame is not None
    ]


def register(run: RunDir, questions: Sequence[Question], references: Sequence[str]) -> dict:
    """data/registration.json: primary metric, n, the very questions with their references, decoding and seed, fixed
    before any answer exists; `references` as `collect_references` gives them.

    Where answers are there already and any of it changes, or what is on file cannot be read, `changed_after_answers`
    becomes true and stays so. The manifest keeps a copy: to lose or change one of the two is no way around that.
    """
    config, path = run.config, run.file("data/registration.json")
    planned = {
        "primary": config.evaluate.primary,
        "open_questions": sum(question.kind == "open" for question in questions),
        "choice_questions": sum(question.kind == "choice" for question in questions),
        "questions_sha256": _digest([sorted((q.id, q.prompt) for q in questions), list(references)]),
        "decoding": config.generate.model_dump(mode="json", exclude={"batch_size"}),
        "seed": config.evaluate.seed,
    }
    # Of answers without a registration nothing is known.
    changed = answered = run.file("baseline/answers.jsonl").exists()
    if before := run.manifest().get("registered") or _read_registration(path):
        changed = before.pop("changed_after_answers")
        changed |= before != planned and answered
    planned["changed_after_answers"] = changed
    run.note("registered", planned)
    write_json(path, planned)
    return planned


def _read_registration(path: Path) -> dict:
    """What is on file; empty where nothing is. One that cannot be read equals none of today's."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    readable = isinstance(found, dict) and isinstance(found.get("changed_after_answers"), bool)
    return found if readable else {"changed_after_answers": False}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_digest(run: RunDir, which: Model) -> str:
    """A digest of who answers: the base model as stage 01 recorded it, and for `tuned` the adapter that 04 read.

    It comes from the manifest, so that scores can be recomputed where neither model nor adapter is at hand.
    """
    asked = run.record(BY_NAME["01_baseline_inference"])
    who = {key: value for key, value in asked.get("settings", {}).items() if key.startswith("model")}
    who["computed_on"] = asked.get("computed_on")
    if which == "tuned":
        inputs = run.record(BY_NAME["04_comparison"]).get("inputs", {})
        who["adapter"] = {k: v for k, v in digests(inputs).items() if k.endswith((".safetensors", "_config.json"))}
    return _digest(who)[:16]


def answer_key(question: Question, config: GenerateSection, model: str) -> str:
    """A digest of model, prompt and decoding: answers with the same key are the same model's to the same thing."""
    decoding = config.model_dump(mode="json", exclude={"batch_size"})
    if not config.do_sample:
        decoding = {"max_new_tokens": config.max_new_tokens}
    return _digest([model, question.prompt, decoding])[:16]


def matching_answers(path: Path, keys: Mapping[str, str]) -> dict[str, dict]:
    """{question id: answer}, the last of each, for what is on file under exactly these keys ({question id: key})."""
    texts = ("id", "key", "text")
    found = [a for a in read_lines(path) if all(isinstance(a.get(name), str) for name in texts)]
    return {a["id"]: a for a in found if a["key"] == keys.get(a["id"])}


def current_answers(path: Path, questions: Sequence[Question], config: GenerateSection, model: str) -> dict[str, dict]:
    """{question id: answer} for exactly these questions, this decoding and this model (its digest).

    Raises StageOrderError where an answer is missing, with the count: n is never silently smaller.
    """
    keys = {question.id: answer_key(question, config, model) for question in questions}
    answers = matching_answers(path, keys)
    if len(answers) < len(keys):
        raise StageOrderError(
            f"{path.parent.name}/{path.name} holds {len(answers)} of {len(keys)} answers; run the notebook that "
            "writes it again, it resumes where it stopped."
        )
    return answers


def forced_key(answer: dict) -> str:
    """A digest of an answer's key and text: another text under the same key needs another forced letter."""
    return _digest([answer["key"], answer["text"]])[:16]


def read_forced(path: Path, answers: dict[str, dict], benchmark: pd.DataFrame | None) -> dict[str, str]:
    """{question id: letter} for every multiple-choice answer that was cut off; see `loss.forced_letters`.

    Raises StageOrderError where one is missing.
    """
    if benchmark is None:
        return {}
    options = dict(zip(benchmark["id"].astype(str), benchmark["options"], strict=True))
    needed = {i: forced_key(a) for i, a in answers.items() if a["kind"] == "choice" and needs_forcing(a, options[i])}
    rows = [row for row in read_lines(path) if all(isinstance(row.get(name), str) for name in ("id", "key", "letter"))]
    known = {row["id"]: row["letter"] for row in rows if needed.get(row["id"]) == row["key"]}
    if len(known) < len(needed):
        raise StageOrderError(
            f"{path.parent.name}/{path.name} holds the letters of {len(known)} of {len(needed)} answers that were cut "
            "off; run the notebook that writes it again, it resumes where it stopped."
        )
    return known
