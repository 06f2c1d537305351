"""Whether long answers are read to their end on a CUDA GPU, under unsloth, which cuts what is longer than it was loaded for.

    python -m benchmarks.standin /tmp/standin-8b --vocabulary llama3_bpe.model
    python -m benchmarks.letters measure /tmp/standin-8b --rows medical_o1.jsonl --items medqa_sample.jsonl \\
        --out benchmarks/results/letters.json

A question, then reasoning of 2,048, 3,000 and 5,000 tokens, then the cue: the letters' log-probabilities through unsloth
beside those of the plain backend, each in a process of its own, at a T4's dtype. Then greedy answers to prompts on both
sides of 2,048 tokens, in one batch and one by one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from benchmarks.evidence import add_to_file, where
from utils.config import load_config
from utils.data.prompts import format_multiple_choice, format_prompt
from utils.files import write_json
from utils.hardware import gpus

app = typer.Typer()
LENGTHS = (2048, 3000, 5000)
ITEMS = 8  # of each length
ACROSS = (1900, 2020, 2047, 2049, 2300, 2600)  # tokens of the prompts in one batch
NEW_TOKENS = 32


def texts_of_length(tokenizer, prompts: list[str], reasoning: str, lengths: list[int]) -> list[str]:
    """Each prompt, followed by so much of the reasoning that both have the wanted number of tokens."""
    ids = tokenizer(reasoning, add_special_tokens=False)["input_ids"]
    found = []
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        start = 97 * i  # another stretch of it for each
        wanted = length - len(tokenizer(prompt)["input_ids"])
        found.append(prompt + tokenizer.decode(ids[start : start + wanted]))
    return found


@app.command()
def ask(standin: Path, rows: Path, items: Path, backend: str, out: Path) -> None:
    """One backend, in this process: letters behind long reasoning, and answers in a batch and alone; writes OUT, JSON."""
    from utils.evaluation.generate import check_batching
    from utils.evaluation.loss import CUE, letter_logprobs
    from utils.evaluation.questions import Question
    from utils.models.load import load_model, ready_for_inference

    settings = {"model.name": str(standin.resolve()), "hardware.backend": backend, "hardware.dtype": "float16"}
    if not gpus():  # a dry run with a tiny model
        settings |= {"hardware.device": "cpu", "hardware.dtype": "float32", "model.load_in_4bit": False}
    config = load_config("t4", settings)
    model, tokenizer = load_model(config, max_seq_length=max(LENGTHS) + 256)
    model = ready_for_inference(model)
    asked = pd.read_json(items, lines=True).head(ITEMS).to_dict("records")
    prompts = [format_prompt(format_multiple_choice(one["question"], one["options"]), "native") for one in asked]
    reasoning = "\n".join(pd.read_json(rows, lines=True)["Complex_CoT"].head(60))
    letters = {}
    for length in LENGTHS:
        texts = texts_of_length(tokenizer, prompts, reasoning, [length] * len(prompts))
        letters[length] = [
            letter_logprobs(model, tokenizer, f"{text}\n</think>\n\n{CUE}", one["options"])
            for text, one in zip(texts, asked, strict=True)
        ]
    across = texts_of_length(tokenizer, prompts[: len(ACROSS)], reasoning, list(ACROSS))
    questions = [Question(f"{length} tokens", "choice", text) for length, text in zip(ACROSS, across, strict=True)]
    write_json(
        out, {"letters": letters, "batch": check_batching(model, tokenizer, questions, "auto", len(ACROSS), NEW_TOKENS)}
    )


def compare(unsloth: dict, plain: dict) -> dict:
    """For each length: items, how many have the same likeliest letter, and the largest difference in nats."""
    found = {}
    for length, pairs in unsloth["letters"].items():
        both = list(zip(pairs, plain["letters"][length], strict=True))
        found[length] = {
            "items": len(both),
            "same_letter": sum(max(one, key=one.get) == max(other, key=other.get) for one, other in both),
            "largest_difference": max(abs(one[letter] - other[letter]) for one, other in both for letter in one),
            # What the letters themselves lie apart: a difference that is small beside it decides nothing.
            "median_lead": sorted(sorted(other.values())[-1] - sorted(other.values())[-2] for _, other in both)[
                len(both) // 2
            ],
        }
    return found


@app.command()
def measure(
    standin: Path,
    rows: Annotated[Path, typer.Option(help="Training rows, JSONL, whose reasoning fills the prompts.")],
    items: Annotated[Path, typer.Option(help="Multiple-choice items, JSONL.")],
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
) -> None:
    """Ask through both backends, a process each, and write what differs."""
    backends = ("unsloth", "transformers") if gpus() else ("transformers", "transformers")
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for number, backend in enumerate(backends):
            file = Path(scratch) / f"{number}.json"
            command = [sys.executable, "-m", "benchmarks.letters", "ask", standin, rows, items, backend, file]
            subprocess.run([str(part) for part in command], check=True)
            found.append(json.loads(file.read_text(encoding="utf-8")))
    evidence = {
        "what": "letters behind long reasoning, unsloth against the plain backend; prompts on both sides of 2,048 tokens",
        **where(),
        "letters": compare(*found),
        "prompt_tokens": list(ACROSS),
        "batch": dict(zip(("unsloth", "plain"), (one["batch"] for one in found), strict=True)),
    }
    add_to_file(out, evidence)
    print(json.dumps({key: evidence[key] for key in ("letters", "batch")}, indent=1))


if __name__ == "__main__":
    app()
