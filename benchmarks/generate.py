"""How fast the engine answers, against one prompt at a time, on a CUDA GPU with a T4's limits emulated.

    python -m benchmarks.standin /tmp/standin-8b --vocabulary llama3_bpe.model
    python -m benchmarks.generate measure /tmp/standin-8b --rows medical_o1_sample.jsonl \\
        --items medqa_sample.jsonl --out generation.json
    python -m benchmarks.generate kill /tmp/standin-8b --items medqa_sample.jsonl --out generation.json

Same model, same prompts, same sampling, same limit of new tokens, in one process. A model of random weights never ends an
answer, so every answer is as long as the limit; the last case draws lengths as a reasoning model's answers have them.
`kill` kills a process in the middle of its answers and lets another go on. The result lies in benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.evidence import add_to_file
from utils.config import load_config
from utils.data.prompts import format_multiple_choice, format_prompt
from utils.evaluation import generate as generation
from utils.evaluation.questions import Question
from utils.files import write_json
from utils.hardware import GIB, gpus, installed
from utils.schema import GenerateSection

app = typer.Typer()
WINDOWS = 3  # of one-at-a-time generation, a prompt each


def load(standin: Path, items: Path):
    """(model, tokenizer, questions, profile t4's decoding): as the notebooks load them, through unsloth on CUDA."""
    from utils.models.load import load_model, ready_for_inference

    settings = {"model.name": str(standin.resolve()), "hardware.emulate_t4": True}
    if not gpus():  # a dry run with a tiny model
        settings |= {"hardware.device": "cpu", "hardware.backend": "transformers", "model.load_in_4bit": False}
        settings |= {"hardware.emulate_t4": False, "hardware.dtype": "float32"}
    config = load_config("t4", settings)
    model, tokenizer = load_model(config, max_seq_length=4096)  # unsloth cuts what is longer
    lines = [json.loads(line) for line in items.read_text(encoding="utf-8").split("\n") if line.strip()]
    questions = [
        Question(row["id"], "choice", format_prompt(format_multiple_choice(row["question"], row["options"]), "native"))
        for row in lines
    ]
    return ready_for_inference(model), tokenizer, questions, config.generate


def measure_single(model, tokenizer, questions: list[Question], config: GenerateSection) -> list[float]:
    """Tokens per second of plain `generate`, one prompt at a time, for each of WINDOWS prompts after a short warm-up."""
    import torch

    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.do_sample else {}
    windows = []
    for i, question in enumerate(questions[: WINDOWS + 1]):
        inputs = tokenizer(question.prompt, return_tensors="pt").to(model.device)
        started = time.monotonic()
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=config.max_new_tokens if i else 16, do_sample=config.do_sample, **sampling,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        windows.append((output.shape[1] - inputs.input_ids.shape[1]) / (time.monotonic() - started))
    return [round(speed, 2) for speed in windows[1:]]


def measure_engine(model, tokenizer, questions: list[Question], config: GenerateSection, lengths=None) -> dict:
    """Tokens per second of the engine over all questions; `lengths` ends each answer after so many tokens."""
    import torch

    batches, real = [], generation.generate_batch

    def recorded(model, tokenizer, batch, steps, settings):
        left = [steps if lengths is None else lengths[p.question.id] - len(p.generated) for p in batch]
        outputs = real(model, tokenizer, batch, min(steps, max(left)), settings)
        batches.append(len(batch))
        if lengths is None:
            return outputs
        # A row that ends early waits, as rows do in generate, until the last of its batch is done.
        eos = tokenizer.eos_token_id
        return [[*ids[: n - 1], eos] if n <= len(ids) else ids for ids, n in zip(outputs, left, strict=True)]

    generation.generate_batch = recorded
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            started = time.monotonic()
            path = Path(scratch) / "answers.jsonl"
            answers = generation.answer_questions(model, tokenizer, questions, config, path, "bench")
            seconds = time.monotonic() - started
    finally:
        generation.generate_batch = real
    cuda = torch.cuda.is_available()
    return {
        "questions": len(questions),
        "decoding": config.model_dump(mode="json"),
        "tokens": sum(a["tokens"] for a in answers),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(sum(a["tokens"] for a in answers) / seconds, 1),
        "batch_size": max(batches),
        "batches": batches,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if cuda else None,
    }


def kill_and_continue(standin: Path, items: Path) -> dict:
    """Kill -9 a process in the middle of its answers, start another, and count what was answered how often."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "answers.jsonl"
        command = [sys.executable, "-m", "benchmarks.generate", "answer", str(standin), str(items), str(path)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 0):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]]
    wanted = sum(bool(line.strip()) for line in items.read_text(encoding="utf-8").split("\n"))
    return {
        "killed_after": len(before),
        "answers": len(after),
        "generated_twice": len(after) - len(set(after)),
        "missing": wanted - len(set(after)),
    }


def add(evidence: dict, name: str, single: list[float], case: dict, out: Path) -> None:
    """Put a case into the evidence, the first one also as the headline, and write it."""
    ratio = round(case["tokens_per_second"] / statistics.median(single), 2)
    evidence["cases"][name] = {"ratio": ratio, "one_at_a_time_windows": single, **case}
    headline = next(iter(evidence["cases"].values()))
    evidence |= {key: headline[key] for key in ("ratio", "tokens_per_second", "batch_size", "reserved_gib")}
    write_json(out, evidence)


@app.command()
def answer(standin: Path, items: Path, path: Path) -> None:
    """Answer all items in few tokens and small batches: what `measure` kills and starts again."""
    model, tokenizer, questions, decoding = load(standin, items)
    few = decoding.model_copy(update={"max_new_tokens": 48, "batch_size": 16})
    generation.answer_questions(model, tokenizer, questions, few, path, "bench")


@app.command()
def kill(
    standin: Path,
    items: Annotated[Path, typer.Option(help="Multiple-choice items, JSONL.")],
    out: Annotated[Path, typer.Option(help="The evidence of `measure`, to which this is added.")],
) -> None:
    """Kill -9 in the middle, start again, and count; exit 1 where an answer is missing or was generated twice."""
    counted = kill_and_continue(standin, items)
    add_to_file(out, {"kill": counted})
    print(json.dumps(counted))
    raise typer.Exit(bool(counted["generated_twice"] or counted["missing"]))


@app.command()
def measure(
    standin: Path,
    items: Annotated[Path, typer.Option(help="Multiple-choice items, JSONL.")],
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    rows: Annotated[Path, typer.Option(help="Open questions, JSONL: the headline.")],
    limit: Annotated[int, typer.Option(help="New tokens of an answer; drawn lengths go up to twelve times it.")] = 128,
    count: Annotated[int, typer.Option(help="How many answers of drawn lengths.")] = 64,
) -> None:
    """Measure both ways: short answers to open and multiple-choice questions, then drawn lengths; write OUT after each."""
    evidence: dict = {
        "what": "the engine against one prompt at a time: 8B shapes, 4-bit, fp16, T4 attention, at most 14.0 GiB",
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": [gpu.name for gpu in gpus()],
        "versions": {p: installed(p) for p in ("torch", "unsloth", "transformers", "bitsandbytes")},
        "cases": {},
    }
    model, tokenizer, choices, decoding = load(standin, items)
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").split("\n") if line.strip()]
    opened = [Question(f"open-{i}", "open", format_prompt(row["Question"], "native")) for i, row in enumerate(lines)]
    short = decoding.model_copy(update={"max_new_tokens": limit})
    measure_engine(model, tokenizer, opened, short.model_copy(update={"max_new_tokens": 4}))  # compiles
    for name, questions in (("open questions", opened), ("multiple choice", choices)):
        single = measure_single(model, tokenizer, questions, short)
        add(evidence, name, single, measure_engine(model, tokenizer, questions, short), out)
    # A median of 650 tokens: the paper's model writes 712 on average.
    rng, longest = np.random.default_rng(0), 12 * limit
    drawn = np.clip(rng.lognormal(np.log(longest * 0.42), 0.45, len(choices)), 8, longest).astype(int)
    lengths = {q.id: int(n) for q, n in zip(choices, drawn, strict=True)}
    single = measure_single(model, tokenizer, choices, decoding.model_copy(update={"max_new_tokens": 5 * limit}))
    long = decoding.model_copy(update={"max_new_tokens": longest})
    add(evidence, "drawn lengths", single, measure_engine(model, tokenizer, choices[:count], long, lengths), out)
    print(json.dumps({key: evidence[key] for key in ("ratio", "tokens_per_second", "batch_size", "reserved_gib")}))


if __name__ == "__main__":
    app()
