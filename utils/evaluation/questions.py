"""What both models are asked, and the answers on file: pure, so that scores can be recomputed without a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from utils.data.prompts import format_multiple_choice, format_prompt
from utils.data.rows import read_benchmark
from utils.errors import DataError, RunDirError
from utils.evaluation.answer_parsing import explicit_letter, parse_completion
from utils.files import digest_of, digests, read_json, read_lines, write_json
from utils.hardware import gpus, processes
from utils.pipeline.run_dir import RunDir
from utils.pipeline.stages import BY_NAME
from utils.schema import Config, GenerateSection

Model = Literal["base", "tuned"]
FOLDERS: dict[Model, str] = {"base": "baseline", "tuned": "tuned"}  # where a model's files lie in the run directory
TUTORIAL = "anecdote"  # id and kind of the tutorials' own question, as saved answers have it
# What answers and losses are held against; a group is what counts as one independent unit.
_REFERENCES = ("id", "group", "Question", "Complex_CoT", "Response", "answer", "choices")
_RIGHT_LETTERS = ("id", "group", "benchmark", "gold")
# A T4 with the 8B model in 4 bits, at its slowest: estimated, see the table in docs/kaggle-and-colab.md; none was at hand.
_TRAINED, _ANSWERED, _SECOND_T4 = 300.0, 80.0, 0.6  # tokens a second, loads and trials included; what a second one adds
_ROW_TOKENS, _ROWS_IN_A_PACK, _ANSWER_TOKENS = 700, 3, 1350  # means; of an answer with 4,096 tokens of room
_REST_S = 4200.0  # an hour to install, download and export, and the ten minutes by which a session ends early


@dataclass(frozen=True)
class Question:
    """One thing to answer."""

    id: str
    kind: str  # open (in words), choice (a letter), or TUTORIAL (shown and never scored)
    prompt: str  # the whole model input


def build_questions(
    config: Config, held_out: pd.DataFrame, benchmark: pd.DataFrame | None, tutorial_question: dict | None = None
) -> list[Question]:
    """The held-out questions (as many as evaluate.questions), the benchmarks' items, and the tutorials' question if any."""
    asked = [(row.id, "open", row.Question) for row in held_out[: config.evaluate.questions].itertuples()]
    for item in benchmark.itertuples() if benchmark is not None else ():
        asked.append((str(item.id), "choice", format_multiple_choice(item.question, item.options)))
    if tutorial_question:
        asked.append((TUTORIAL, TUTORIAL, tutorial_question["Question"]))
    counts = Counter(identifier for identifier, *_ in asked)
    if twice := [identifier for identifier, count in counts.items() if count > 1]:
        raise DataError(f"The id {twice[0]} belongs to two questions; every row and item needs an id of its own.")
    return [Question(identifier, kind, format_prompt(text, config.prompt)) for identifier, kind, text in asked]


def questions_that_fit(config: Config, questions: Sequence[Question], train_rows: int) -> str:
    """How many questions both models answer within hardware.max_hours beside training, and what to set where it is fewer.

    Empty without a limit, and where the GPU is no T4: there 01 forecasts by what it measures.
    """
    hours, train, found = config.hardware.max_hours, config.train, gpus()
    if hours is None or not found or not found[0].name.endswith(" T4"):
        return ""
    in_update = train.rows_per_update * (_ROWS_IN_A_PACK if train.packing else 1)
    rows = train_rows * train.num_train_epochs if train.max_steps is None else train.max_steps * in_update
    count = processes(config.hardware)
    speed = 1 + _SECOND_T4 * (count - 1)
    left = 3600 * hours - _REST_S - rows * _ROW_TOKENS / _TRAINED / speed
    each = 2 * min(_ANSWER_TOKENS, config.generate.max_new_tokens) / _ANSWERED / speed
    fit, asked = max(0, int(left / each) // 10 * 10), sum(question.kind != TUTORIAL for question in questions)
    on = "one Tesla T4" if count == 1 else f"{count} Tesla T4s"
    room = f"On {on} about {fit} questions to an 8B model fit into {hours:g} hours beside training (estimated)"
    if fit >= asked:
        return f"{room}; this run asks {asked}."
    fewer = fit - sum(q.kind == "open" for q in questions) - sum(b.rows or 0 for b in config.evaluate.more_benchmarks)
    instead = f"set evaluate.benchmark.rows={fewer} before the first answer, or " if fewer > 0 else ""
    return f"{room}; this run asks {asked}: {instead}let it go on in another session."


def load_questions(run: RunDir) -> tuple[list[Question], pd.DataFrame, pd.DataFrame | None]:
    """(questions, held-out rows, benchmark items): what 00 froze in the run directory, as both models are asked it."""
    held_out = pd.read_parquet(run.file("data/eval.parquet"))
    benchmark = read_benchmark(run.file("data"))
    return build_questions(run.config, held_out, benchmark, load_tutorial_question(run)), held_out, benchmark


def load_tutorial_question(run: RunDir) -> dict:
    """The row by which the tutorials judge, kept out of training; empty where the data have no such row."""
    return read_json(run.file("data/anecdote.json"))


def collect_references(held_out: pd.DataFrame, benchmark: pd.DataFrame | None) -> list[str]:
    """What answers and losses are held against, as JSON texts: the held-out rows and the right letters, each by id."""
    return [
        frame[[column for column in columns if column in frame]].sort_values("id").to_json(orient="records")
        for frame, columns in ((held_out, _REFERENCES), (benchmark, _RIGHT_LETTERS))
        if frame is not None
    ]


def register(run: RunDir, questions: Sequence[Question], references: Sequence[str]) -> dict:
    """data/registration.json: primary metric, n, questions, `collect_references`, decoding and seed, before any answer.

    Where answers are there already and any of it changes, `changed_after_answers` becomes true and stays so.
    """
    config, path = run.config, run.file("data/registration.json")
    planned = {
        "primary": config.evaluate.primary,
        "open_questions": sum(question.kind == "open" for question in questions),
        "choice_questions": sum(question.kind == "choice" for question in questions),
        "questions_sha256": digest_of([sorted((q.id, q.prompt) for q in questions), list(references)], 64),
        "decoding": config.generate.model_dump(mode="json", exclude={"batch_size"}),
        "seed": config.evaluate.seed,
    }
    before = read_json(path) if path.exists() else {}
    changed = before.pop("changed_after_answers", False)
    # Of answers without a registration nothing is known.
    planned["changed_after_answers"] = changed or (run.file("baseline/answers.jsonl").exists() and before != planned)
    write_json(path, planned)
    return planned


def model_digest(run: RunDir, which: Model) -> str:
    """A digest of the base as 01 recorded it, and for `tuned` of the adapter that 04 read; neither need be at hand."""
    asked = run.record(BY_NAME["01_baseline_inference"])
    who = {key: value for key, value in asked.get("settings", {}).items() if key.startswith("model")}
    who["computed_on"] = asked.get("computed_on")
    if which == "tuned":
        inputs = run.record(BY_NAME["04_comparison"]).get("inputs", {})
        who["adapter"] = {k: v for k, v in digests(inputs).items() if k.endswith((".safetensors", "_config.json"))}
    return digest_of(who)


def answer_key(question: Question, config: GenerateSection, model: str) -> str:
    """A digest of model, prompt and decoding: answers with the same key are the same model's to the same thing."""
    decoding = config.model_dump(mode="json", exclude={"batch_size"})
    if not config.do_sample:
        decoding = {"max_new_tokens": config.max_new_tokens}
    return digest_of([model, question.prompt, decoding])


def matching_rows(path: Path, keys: Mapping[str, str]) -> dict[str, dict]:
    """{id: row}, the last of each, for what is on file (JSONL) under exactly these keys ({id: key})."""
    return {row["id"]: row for row in read_lines(path) if "key" in row and row["key"] == keys.get(row.get("id"))}


def require_rows(path: Path, keys: Mapping[str, str], what: str) -> dict[str, dict]:
    """`matching_rows`; raises RunDirError where one is missing, with the count: n is never silently smaller."""
    rows = matching_rows(path, keys)
    if len(rows) < len(keys):
        found = f"{path.parent.name}/{path.name} holds {len(rows)} of {len(keys)} {what}"
        raise RunDirError(f"{found}; run the notebook that writes it again, it resumes where it stopped.")
    return rows


def current_answers(path: Path, questions: Sequence[Question], config: GenerateSection, model: str) -> dict[str, dict]:
    """{question id: answer} for exactly these questions, this decoding and this model (its digest), or RunDirError."""
    return require_rows(path, {question.id: answer_key(question, config, model) for question in questions}, "answers")


def find_letterless(answers: Mapping[str, dict], benchmark: pd.DataFrame | None) -> dict[str, tuple[str, dict]]:
    """{id: (a digest of key and text, options)} of the multiple-choice answers that have to be asked for their letter."""
    options = {} if benchmark is None else dict(zip(benchmark["id"].astype(str), benchmark["options"], strict=True))
    return {
        name: (digest_of([answer["key"], answer["text"]]), options[name])
        for name, answer in answers.items()
        if answer["kind"] == "choice"
        and explicit_letter(parse_completion(answer["text"]).answer, options[name]) is None
    }


def read_forced(path: Path, answers: Mapping[str, dict], benchmark: pd.DataFrame | None) -> dict[str, str]:
    """{question id: letter} of every answer that states none (see `loss.forced_letters`), or RunDirError."""
    keys = {name: key for name, (key, _) in find_letterless(answers, benchmark).items()}
    rows = require_rows(path, keys, "letters of answers that state none")
    return {name: row["letter"] for name, row in rows.items()}
