"""How fast the engine answers, against one prompt at a time, on a CUDA GPU with a T4's limits emulated.

    python -m benchmarks.standin /tmp/standin-8b --vocabulary llama3_bpe.model
    python -m benchmarks.generate measure /tmp/standin-8b --rows medical_o1_sample.jsonl \\
        --items medqa_sample.jsonl --out generation.json
    python -m benchmarks.generate kill /tmp/standin-8b --items medqa_sample.jsonl --out generation.json
    python -m benchmarks.generate real-job /tmp/standin-8b --rows medical_o1_sample.jsonl \\
        --items medqa_sample.jsonl --out generation.json
    python -m benchmarks.generate steps /tmp/standin-8b --items medqa_sample.jsonl --out generation.json

Same prompts, same sampling, same limit of new tokens. A model of random weights hardly ever ends an answer, so almost every
answer is as long as the limit; the last case of `measure` draws lengths as a reasoning model's answers have them. `kill`
kills a process in the middle of its answers and lets another go on. `real-job` has the shape of profile t4's work: 600
multiple-choice and 16 open questions, lengths drawn with a median of 900 tokens, at most 4,096. Its peers answer a sample
in a process of their own (`peers`), by unsloth without the series' changes: a dozen one at a time, and two batches of
`generate` sorted by prompt. `library` adds a minute of transformers' continuous batching. `steps` compares the logits of a
batch's steps with those of each row alone, which unsloth computes, and times a step by how 4-bit weights are unpacked. The
result lies in benchmarks/results/. On an H200 `real-job` takes ten minutes with a second GPU, twenty without.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.evidence import add_to_file, where
from utils.config import load_config
from utils.data.prompts import format_multiple_choice, format_prompt
from utils.evaluation import generate as generation
from utils.evaluation.generate import Pending
from utils.evaluation.questions import Question
from utils.files import write_json
from utils.hardware import GIB, gpu_ids, gpus
from utils.models.memory import free_memory
from utils.models.unsloth_patches import forget_cache
from utils.processes import Child
from utils.schema import GenerateSection

app = typer.Typer()
Items = Annotated[Path, typer.Option(help="Multiple-choice items, JSONL.")]
Rows = Annotated[Path, typer.Option(help="Open questions, JSONL.")]
WINDOWS = 3  # of one-at-a-time generation, a prompt each
LIMIT, MEDIAN, LOG_SD = 4096, 900, 0.5  # tokens of the real job's answers
SINGLES, SORTED, LIBRARY_SECONDS = 12, 2, 60  # answers one at a time, sorted batches, of the peers


def load(standin: Path, items: Path, room: int = 4096, backend: str = "auto"):
    """(model, tokenizer, questions, profile t4's decoding): as the notebooks load them, through unsloth on CUDA."""
    from utils.models.load import load_model, ready_for_inference

    settings = {"model.name": str(standin.resolve()), "hardware.emulate_t4": True, "hardware.backend": backend}
    if not gpus():  # a dry run with a tiny model
        settings |= {"hardware.device": "cpu", "hardware.backend": "transformers", "model.load_in_4bit": False}
        settings |= {"hardware.emulate_t4": False, "hardware.dtype": "float32"}
    config = load_config("t4", settings)
    model, tokenizer = load_model(config, max_seq_length=room)  # unsloth cuts what is longer
    lines = [json.loads(line) for line in items.read_text(encoding="utf-8").split("\n") if line.strip()]
    questions = [
        Question(row["id"], "choice", format_prompt(format_multiple_choice(row["question"], row["options"]), "native"))
        for row in lines
    ]
    return ready_for_inference(model), tokenizer, questions, config.generate


def measure_single(model, tokenizer, questions: list[Question], config: GenerateSection) -> list[float]:
    """Tokens per second of plain `generate`, one prompt at a time, for each of WINDOWS prompts after a short warm-up."""
    time_generate(model, tokenizer, questions[:1], [16], config)
    single = [[question] for question in questions[1 : WINDOWS + 1]]
    windows = [time_generate(model, tokenizer, one, [config.max_new_tokens], config) for one in single]
    return [round(peer_speed([window]), 2) for window in windows]


def measure_engine(model, tokenizer, questions: list[Question], config: GenerateSection, lengths=None) -> dict:
    """Tokens per second of the engine over all questions; `lengths` ends each answer after so many tokens."""
    import torch

    batches, too_large, real = [], [], generation.generate_batch

    def recorded(model, tokenizer, batch, steps, settings):
        left = [steps if lengths is None else lengths[p.question.id] - len(p.generated) for p in batch]
        steps, began = min(steps, max(left)), time.monotonic()
        try:
            outputs = real(model, tokenizer, batch, steps, settings)
        except RuntimeError:
            too_large.append(len(batch))
            raise
        batches.append([len(batch), steps, round(time.monotonic() - began, 2)])
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
        "batch_size": max(rows for rows, _, _ in batches),
        "steps": sum(steps for _, steps, _ in batches),
        "batches": batches,  # rows, steps, seconds
        "out_of_memory": too_large,  # rows
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if cuda else None,
    }


def real_questions(choices: list[Question], rows: Path) -> tuple[list[Question], dict[str, int]]:
    """616 questions (the items again and again under other ids) and the tokens that each answer will have, by id."""
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").split("\n") if line.strip()]
    asked = [
        Question(f"{i}-{choices[i % len(choices)].id}", "choice", choices[i % len(choices)].prompt) for i in range(600)
    ]
    asked += [
        Question(f"open-{i}", "open", format_prompt(row["Question"], "native")) for i, row in enumerate(lines[:16])
    ]
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN), LOG_SD, len(asked)).clip(8, LIMIT).astype(int)
    return asked, {question.id: int(n) for question, n in zip(asked, drawn, strict=True)}


def sampled(config: GenerateSection, tokenizer) -> dict:
    """generate's own arguments for the profile's sampling."""
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.do_sample else {}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"do_sample": config.do_sample, **sampling, **ids}


def time_generate(model, tokenizer, questions: list[Question], lengths: list[int], config: GenerateSection) -> dict:
    """One call of `generate` on a batch, padded on the left, that runs until its longest answer is done."""
    import torch

    forget_cache(model)
    rows = [tokenizer(question.prompt)["input_ids"] for question in questions]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    started = time.monotonic()
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max(lengths),
            **sampled(config, tokenizer),
        )  # fmt: skip
    written = output.shape[1] - width
    seconds = time.monotonic() - started
    return {
        "rows": len(rows),
        "steps": written,
        "tokens": sum(min(n, written) for n in lengths),
        "seconds": round(seconds, 2),
    }


def peer_speed(windows: list[dict]) -> float:
    """Tokens per second over all windows."""
    return sum(window["tokens"] for window in windows) / sum(window["seconds"] for window in windows)


def time_library(model, tokenizer, questions: list[Question], lengths: dict[str, int], config: GenerateSection) -> dict:
    """transformers' continuous batching, paged attention under sdpa, for LIBRARY_SECONDS after a warm-up of ten seconds.

    Its draws come from one stream for all requests, so an answer would depend on who else is being answered.
    """
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from utils.models.memory import free_bytes

    block = 256
    shape = model.config
    each = 2 * shape.num_hidden_layers * shape.num_key_value_heads * (shape.hidden_size // shape.num_attention_heads)
    room = free_bytes(model.device) - 2**30  # logits and activations
    blocks = max(64, min(512, int(room // (block * each * model.dtype.itemsize))))
    # Without CUDA graphs: transformers' default for paged attention under sdpa.
    engine = ContinuousBatchingConfig(block_size=block, num_blocks=blocks, max_batch_tokens=512, use_cuda_graph=False)
    model.set_attn_implementation("paged|sdpa")
    generation = GenerationConfig(max_new_tokens=LIMIT, **sampled(config, tokenizer))
    with model.continuous_batching_context_manager(
        generation, continuous_batching_config=engine, warmup=False
    ) as manager:
        for question in questions:
            ids = tokenizer(question.prompt)["input_ids"]
            manager.add_request(ids, question.id, max_new_tokens=lengths[question.id], streaming=True)
        counts, began = {}, time.monotonic()
        marks = []
        for wait in (10, 10 + LIBRARY_SECONDS):
            while time.monotonic() - began < wait and manager.is_running():
                result = manager.get_result(timeout=1)
                if result is not None:
                    counts[result.request_id] = len(result.generated_tokens)
            marks.append((time.monotonic(), sum(counts.values())))
        manager.stop(hard_stop=True, timeout=60)  # or it would go on to its last answer
    (first, before), (last, after) = marks
    return {
        "tokens": after - before,
        "seconds": round(last - first, 1),
        "blocks": blocks,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if torch.cuda.is_available() else None,
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
    items: Items,
    out: Annotated[Path, typer.Option(help="The evidence of `measure`, to which this is added.")],
) -> None:
    """Kill -9 in the middle, start again, and count; exit 1 where an answer is missing or was generated twice."""
    counted = kill_and_continue(standin, items)
    add_to_file(out, {"kill": counted})
    print(json.dumps(counted))
    raise typer.Exit(bool(counted["generated_twice"] or counted["missing"]))


@app.command()
def real_job(
    standin: Path,
    items: Items,
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON; what else it holds stays.")],
    rows: Rows,
) -> None:
    """The whole job by the engine; samples of it by `peers`, at the same time where there is a second GPU, else after it."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as children:
        place, second = Path(scratch) / "peers.json", gpu_ids()[1:2]
        command = [sys.executable, "-m", "benchmarks.generate", "peers", standin.resolve(), "--out", place]
        command += ["--items", items.resolve(), "--rows", rows.resolve()]
        apart = {"UNSLOTH_COMPILE_LOCATION": str(Path(scratch) / "compiled")}
        apart |= {"CUDA_VISIBLE_DEVICES": second[0]} if second else {}

        def start() -> Child:
            return children.enter_context(Child(command, Path(scratch) / "peers.log", apart))

        beside = start() if second else None
        model, tokenizer, choices, decoding = load(standin, items, room=LIMIT + 1024)
        questions, lengths = real_questions(choices, rows)
        long = decoding.model_copy(update={"max_new_tokens": LIMIT})
        found: dict = {
            "what": f"{len(questions)} questions, median {MEDIAN} tokens, at most {LIMIT}; 4-bit, fp16, at most 14.0 GiB",
            **where(),
            "peers_at_the_same_time": bool(second),
        }
        measure_engine(model, tokenizer, questions[:4], long.model_copy(update={"max_new_tokens": 4}))  # compiles
        found["engine"] = measure_engine(model, tokenizer, questions, long, lengths)
        add_to_file(out, {"real_job": found})
        print("engine", found["engine"]["tokens_per_second"], flush=True)
        del model
        free_memory()
        beside = beside or start()
        if status := beside.wait():
            raise SystemExit(
                f"The peers ended with status {status} ({beside.last_words()}); the engine's figures are in {out}."
            )
        answered = json.loads(place.read_text(encoding="utf-8"))
    for peer, windows in answered.items():
        ratio = round(found["engine"]["tokens_per_second"] / peer_speed(windows), 2)
        found |= {peer: windows, f"ratio_{peer}": ratio}
        print(peer, ratio)
    add_to_file(out, {"real_job": found})


@app.command()
def peers(
    standin: Path,
    items: Items,
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON; what else it holds stays.")],
    rows: Rows,
) -> None:
    """Samples of the real job by unsloth as it is, without the series' changes: sorted batches, a dozen one at a time."""
    from utils.models import load as loading
    from utils.models.memory import sequences_that_fit

    loading.patch_unsloth = lambda: None
    model, tokenizer, choices, decoding = load(standin, items, room=LIMIT + 1024)
    questions, lengths = real_questions(choices, rows)
    long = decoding.model_copy(update={"max_new_tokens": LIMIT})
    time_generate(model, tokenizer, questions[:2], [4], long)  # compiles
    by_prompt = sorted(questions, key=lambda question: -len(tokenizer(question.prompt)["input_ids"]))
    prompt = len(tokenizer(by_prompt[0].prompt)["input_ids"])
    size = min(sequences_that_fit(model, prompt, LIMIT), len(questions))
    windows = []
    for i in range(SORTED):  # from the middle of equal parts of the whole
        first = (2 * i + 1) * len(questions) // (2 * SORTED) - size // 2
        batch = by_prompt[max(0, first) : max(0, first) + size]
        windows.append(time_generate(model, tokenizer, batch, [lengths[q.id] for q in batch], long))
        add_to_file(out, {"sorted": windows})
        print("sorted", windows[-1], flush=True)
    by_length = sorted(questions, key=lambda question: lengths[question.id])
    windows = []
    for i in sorted(range(SINGLES), key=lambda i: abs(2 * i + 1 - SINGLES)):  # the middle first, should time run out
        question = by_length[(2 * i + 1) * len(questions) // (2 * SINGLES)]
        windows.append(time_generate(model, tokenizer, [question], [lengths[question.id]], long))
        add_to_file(out, {"single": windows})
        print("single", windows[-1], flush=True)


def forced_logits(model, tokenizer, rows: list[list[int]], forced, places: list[int]):
    """Logits (rows, places, vocabulary) after the tokens `forced` (rows, steps), taken in one batch, at some of the steps."""
    import torch

    free_memory(model)
    width, pad = max(map(len, rows)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    positions, past, found = (mask.cumsum(-1) - 1).clamp(min=0), None, []
    with torch.inference_mode(), torch.autocast(model.device.type, dtype=model.dtype, enabled=bool(gpus())):
        for step in range(-1, forced.shape[1]):
            if step >= 0:
                ids, positions = forced[:, step : step + 1], positions[:, -1:] + 1
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": past}
            output = model(**given, use_cache=True, return_dict=True, logits_to_keep=1)
            past = output.past_key_values
            if step in places:
                found.append(output.logits[:, -1].float().cpu())
    return torch.stack(found, dim=1)


def compare_steps(model, tokenizer, choices: list[Question]) -> dict:
    """The largest difference of logits between three rows in a batch and each alone, in standard deviations, and how many
    of the likeliest tokens are the same; at some of 300 steps, among them those around each growth of the cache.
    """
    import torch

    rows = [tokenizer(question.prompt)["input_ids"] for question in choices[:3]]
    width = max(map(len, rows))
    growths = [length - width for length in range(0, width + 299, 128) if length > width]
    places = sorted({0, 1, 2, 299, *(place + by for place in growths for by in (-1, 0, 1))})
    tokens = np.random.default_rng(0).integers(10, min(90_000, model.config.vocab_size), (len(rows), 300))
    forced = torch.tensor(tokens, device=model.device)
    together = forced_logits(model, tokenizer, rows, forced, places)
    alone = [forced_logits(model, tokenizer, [row], forced[i : i + 1], places) for i, row in enumerate(rows)]
    apart = torch.cat(alone)
    return {
        "largest_difference": round(float(((together - apart).abs().amax(-1) / apart.std(-1)).max()), 4),
        "same_likeliest": round(float((together.argmax(-1) == apart.argmax(-1)).float().mean()), 4),
    }


def with_random_lora(model):
    """The model with LoRA of rank 16 on every linear layer, its weights random: an adapter that changes the answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from utils.models.load import ready_for_inference
    from utils.schema import LoraSection

    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=LoraSection().target_modules))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    return ready_for_inference(tuned)


def time_step(model, tokenizer, choices: list[Question], length: int, rows: int, config: GenerateSection) -> dict:
    """Milliseconds of a step of `rows` sequences from `length` tokens on, by the clock and by kernel time, and its launches."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    batch = [Pending(q, tokenizer(q.prompt)["input_ids"]) for q in (choices[i % len(choices)] for i in range(rows))]
    for one in batch:
        one.generated = [100] * max(0, length - len(one.prompt))

    def run(steps: int) -> float:
        free_memory(model)
        started = time.monotonic()
        generation.generate_batch(model, tokenizer, batch, steps, config)
        return time.monotonic() - started

    def kernels(steps: int) -> tuple[float, int]:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run(steps)
        events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(event.device_time_total for event in events) / 1000, len(events)

    short, long = (min(run(steps) for _ in range(2)) for steps in (1, 65))
    (few_ms, few), (more_ms, more) = kernels(5), kernels(13)
    return {
        "length": length,
        "rows": rows,
        "step_ms": round(1000 * (long - short) / 64, 2),
        "prompts_seconds": round(short, 3),
        "kernel_ms": round((more_ms - few_ms) / 8, 2),
        "launches": (more - few) // 8,
    }


@app.command()
def steps(
    standin: Path,
    items: Items,
    out: Annotated[Path, typer.Option(help="The evidence of `measure`, to which this is added.")],
) -> None:
    """A batch's steps: their logits against each row alone, and their time by the ways to unpack 4-bit weights."""
    model, tokenizer, choices, decoding = load(standin, items, room=LIMIT + 1024)
    before = json.loads(out.read_text(encoding="utf-8")).get("steps", {}) if out.exists() else {}
    found = before | {**where(), "logits": [{"model": "base", **compare_steps(model, tokenizer, choices)}], "ways": []}
    tuned = with_random_lora(model)
    found["logits"].append({"model": "LoRA", **compare_steps(tuned, tokenizer, choices)})
    model = tuned.unload()
    add_to_file(out, {"steps": found})
    if not gpus():
        return
    import torch
    from bitsandbytes.backends.cuda import ops
    from unsloth.kernels import utils as kernels

    fused, own = kernels._gemv_rows, ops._gpu_dispatch_props  # a T4's, as emulated

    def dispatch(index: int) -> tuple[int, int, int]:
        properties = torch.cuda.get_device_properties(index)
        return properties.multi_processor_count, properties.major, properties.minor

    for way in ("as a T4", "unpacked", "as this GPU"):
        ops._gemm_4bit_use_custom_fn.cache_clear()
        kernels._gemv_rows = (lambda *_: None) if way == "unpacked" else fused
        ops._gpu_dispatch_props = dispatch if way == "as this GPU" else own
        for length, rows in ((1000, 12), (1000, 24), (600, 48)):
            timed = time_step(
                model, tokenizer, choices, length, rows, decoding.model_copy(update={"max_new_tokens": LIMIT})
            )
            found["ways"].append({"way": way, **timed})
            add_to_file(out, {"steps": found})
            print(found["ways"][-1], flush=True)


@app.command()
def library(
    standin: Path,
    items: Items,
    out: Annotated[Path, typer.Option(help="The evidence of `real-job`, to which this is added.")],
    rows: Rows,
) -> None:
    """transformers' own continuous batching on the same job, on the plain backend, for a minute."""
    model, tokenizer, choices, decoding = load(standin, items, backend="transformers")
    questions, lengths = real_questions(choices, rows)
    found = json.loads(out.read_text(encoding="utf-8"))["real_job"]
    window = time_library(model, tokenizer, questions, lengths, decoding)
    if not window["tokens"]:
        raise SystemExit("continuous batching answered nothing; its log says why")
    ratio = round(found["engine"]["tokens_per_second"] / peer_speed([window]), 2)
    add_to_file(out, {"real_job": found | {"library": [where() | window], "ratio_library": ratio}})
    print("library", ratio, window)


@app.command()
def measure(
    standin: Path,
    items: Items,
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    rows: Annotated[Path, typer.Option(help="Open questions, JSONL: the headline.")],
    limit: Annotated[int, typer.Option(help="New tokens of an answer; drawn lengths go up to twelve times it.")] = 128,
    count: Annotated[int, typer.Option(help="How many answers of drawn lengths.")] = 64,
) -> None:
    """Measure both ways: short answers to open and multiple-choice questions, then drawn lengths; write OUT after each."""
    evidence: dict = {
        "what": "the engine against one prompt at a time: 8B shapes, 4-bit, fp16, T4 attention, at most 14.0 GiB",
        **where(),
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
