"""How fast training is, against the tutorial's recipe and against plain TRL, on CUDA GPUs with a T4's limits emulated.

    python -m benchmarks.standin /tmp/standin-8b --vocabulary llama3_bpe.model
    python -m benchmarks.train measure /tmp/standin-8b --rows medical_o1_sample.jsonl --out train.json [--quick]
    python -m benchmarks.train two-gpus /tmp/standin-8b --rows medical_o1_sample.jsonl --out train.json     # adds to it
    python -m benchmarks.train table train.json --readme README.md     # the table, and a plot beside the JSON

Each configuration runs notebook 03's own functions in a fresh process: two updates to warm up, then windows of three, of
which the median counts; two more under torch's profiler give the sum of kernel times, which says more about a T4, where
arithmetic is the limit, than the wall time of a GPU that waits for its host. Tokens are those of the rows, padding not
counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from utils.config import load_config
from utils.files import write_json
from utils.platforms import GIB, gpus, installed

app = typer.Typer()
WARM_UP, WINDOW, WINDOWS, PROFILED = 2, 3, 3, 2
_T4 = {"hardware.emulate_t4": True, "hardware.dtype": "float16", "train.loss_on": "all", "prompt.style": "native",
       "train.save_steps": 10_000, "train.num_train_epochs": 100}  # fmt: skip
_FITTED = {"profile": "t4"}
CASES: dict[str, dict] = {
    "tutorial": {"profile": "tutorial", "what": "the tutorial's recipe under unsloth: 2 x 4 rows"},
    "plain": {"profile": "tutorial", "what": "the same in plain TRL + PEFT + bitsandbytes, padded",
              "hardware.backend": "transformers"},
    "ours": {**_FITTED, "what": "profile t4: packed, fitted"},
    "ours, 1,024 tokens": {**_FITTED, "what": "packs of 1,024 tokens", "model.max_seq_length": 1024},
    "ours, 512 tokens": {**_FITTED, "what": "packs of 512 tokens, longer rows cut", "model.max_seq_length": 512},
    "unsloth's attention": {**_FITTED, "what": "ours without utils/packing.py", "own_attention": False},
}  # fmt: skip
QUICK = ("tutorial", "plain", "ours")


def settings_of(name: str, standin: Path) -> tuple[str, dict]:
    """(profile, overrides) of a case."""
    chosen = {key: value for key, value in CASES[name].items() if "." in key}
    dry = {} if gpus() else {"hardware.device": "cpu", "hardware.backend": "transformers", "hardware.dtype": "float32",
                             "hardware.emulate_t4": False, "model.load_in_4bit": False, "train.optim": "adamw_torch"}  # fmt: skip
    return CASES[name]["profile"], {**_T4, "model.name": str(standin.resolve()), **chosen, **dry}


def prepare(name: str, standin: Path, rows: Path, run_dir: Path, count: int):
    """(run, model, tokenizer, rows, make_trainer) of a case, with LoRA, as notebook 03 has them."""
    from benchmarks.recipe import format_rows, notebook_functions
    from utils.stage_run import StageRun
    from utils.stages import BY_NAME

    profile, settings = settings_of(name, standin)
    config = load_config(profile, settings)
    if not CASES[name].get("own_attention", True):
        from utils import models

        models.keep_documents_apart = lambda: None
    load_with_lora, make_trainer = notebook_functions()
    model, tokenizer = load_with_lora(config)
    frame = format_rows(rows, tokenizer, config, count)
    (run_dir / "training").mkdir(parents=True, exist_ok=True)
    return StageRun(run_dir, config, settings, BY_NAME["03_lora_training"]), model, tokenizer, frame, make_trainer


@app.command()
def case(name: str, standin: Path, rows: Path, out: Path, run_dir: Path, count: int = 500) -> None:
    """One configuration, in this process: writes OUT, JSON."""
    import torch

    from utils.models import is_unsloth
    from utils.trial import Stopwatch, choose_fit, recompute_as

    started = time.monotonic()
    run, model, tokenizer, frame, make_trainer = prepare(name, standin, rows, run_dir, count)
    config, loaded, cuda = run.config, time.monotonic(), torch.cuda.is_available()
    fitted = choose_fit(run, model, tokenizer, frame, make_trainer)
    tried = time.monotonic()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    measured = WARM_UP + WINDOW * WINDOWS
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(model, tokenizer, config, frame, fitted, scratch)
        prepared = time.monotonic()
        trainer.args.max_steps = measured + (PROFILED if cuda else 0)
        recompute_as(trainer, config, fitted)
        watch = Stopwatch(trainer)
        profiler = _Profiler(trainer, measured) if cuda else None
        trainer.train()
    windows = []
    for first in range(WARM_UP, measured, WINDOW):
        seconds = watch.ends[first + WINDOW - 1] - watch.ends[first - 1]
        windows.append(round(sum(watch.tokens[first : first + WINDOW]) / seconds, 1))
    result = {
        "what": CASES[name]["what"],
        "windows": windows,
        "tokens_per_second": statistics.median(windows),
        "tokens_per_update": round(statistics.mean(watch.tokens[:measured])),
        "fit": asdict(fitted),
        "packed": bool(config.train.packing and is_unsloth(model)),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if cuda else None,
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if cuda else None,
        "flops_per_token": flops_per_token(model.config, fitted.recompute_layers),
        "seconds": {"load": round(loaded - started, 1), "trials": round(tried - loaded, 1),
                    "prepare": round(prepared - tried, 1), "first_update": round(watch.ends[0] - prepared, 1)},
        "trials": json.loads(run.file("training/fit.json").read_text(encoding="utf-8"))["trials"],
    }  # fmt: skip
    if profiler is not None:
        result["kernels"] = profiler.summary(watch.tokens[measured:])
    write_json(out, result)


@app.command()
def boundary(standin: Path, rows: Path, out: Path) -> None:
    """Whether a packed row sees its neighbour: logits and gradients of two rows, packed and alone; writes OUT, JSON."""
    import torch

    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"  # unsloth returns none in training otherwise
    with tempfile.TemporaryDirectory() as scratch:
        _, model, tokenizer, frame, _ = prepare("ours", standin, rows, Path(scratch), 2)
    texts = (frame["prompt"] + frame["completion"]).str[:2000]
    first, second = (tokenizer(text, return_tensors="pt").input_ids[:, :500].to(model.device) for text in texts)
    model.train()

    def look(ids, lengths) -> tuple:
        """The second row's logits and what its loss asks of the first LoRA matrix."""
        model.zero_grad(set_to_none=True)
        places = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(model.device)
        packed = {"packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)} if len(lengths) > 1 else {}
        with torch.autocast(model.device.type, dtype=torch.float16, enabled=model.device.type == "cuda"):
            logits = (
                model(input_ids=ids, position_ids=places, use_cache=False, **packed)
                .logits[0, -second.shape[1] :]
                .float()
            )
            torch.nn.functional.cross_entropy(logits[:-1], second[0, 1:]).backward()
        slope = next(p.grad for n, p in model.named_parameters() if "lora_B" in n and p.grad is not None)
        return logits.detach(), slope.detach().float().clone()

    both = torch.cat([first, second], dim=1)
    alone, packed = look(second, [second.shape[1]]), look(both, [first.shape[1], second.shape[1]])
    joined = look(both, [both.shape[1]])
    spread = float(alone[0].std())
    result = {
        "logits_std": spread,
        "packed_against_alone": float((packed[0] - alone[0]).abs().max()) / spread,
        "packed_gradient_against_alone": float((packed[1] - alone[1]).norm() / alone[1].norm()),
        "without_boundaries_against_alone": float((joined[0] - alone[0]).abs().max()) / spread,
    }
    write_json(out, {name: round(value, 5) for name, value in result.items()})


def linear_parameters(shape) -> tuple[int, int]:
    """(in all layers, in the output head): weights in matrix products, LoRA's own left out."""
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    attention = 2 * shape.hidden_size * head_size * (shape.num_attention_heads + shape.num_key_value_heads)
    layers = shape.num_hidden_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
    return layers, shape.hidden_size * shape.vocab_size


def flops_per_token(shape, recomputed: int) -> float:
    """2 for each weight forward, 2 for its input's gradient, 2 more where a layer recomputes; attention not counted."""
    layers, head = linear_parameters(shape)
    return 4.0 * (layers + head) + 2.0 * layers * recomputed / shape.num_hidden_layers


class _Profiler:
    """torch's profiler over the updates after the first `skip`: the sum of kernel times, and what took most."""

    def __init__(self, trainer, skip: int):
        import torch
        from transformers import TrainerCallback

        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

        class Switch(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == skip:
                    torch.cuda.synchronize()
                    profiler.__enter__()

            def on_train_end(self, args, state, control, **_):
                torch.cuda.synchronize()
                profiler.__exit__(None, None, None)

        self.profiler = profiler
        trainer.add_callback(Switch())

    def summary(self, tokens: list[int]) -> dict:
        events = self.profiler.key_averages()
        events = [event for event in events if not event.key.startswith("Memcpy")]  # they overlap with arithmetic
        seconds = sum(event.self_device_time_total for event in events) / 1e6
        parts: dict[str, float] = {}
        for event in events:
            part = _part_of(event.key)
            parts[part] = parts.get(part, 0.0) + event.self_device_time_total / 1e6
        ranked = sorted(events, key=lambda event: -event.self_device_time_total)[:12]
        return {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(sum(tokens) / seconds, 1),
            "launches": sum(event.count for event in events),
            "share": {name: round(part / seconds, 3) for name, part in sorted(parts.items(), key=lambda p: -p[1])},
            "longest": [
                [event.key[:90], event.count, round(event.self_device_time_total / 1e6, 4)] for event in ranked
            ],
        }


def _part_of(kernel: str) -> str:
    """Which part of the work a kernel belongs to, by its name."""
    parts = {
        "matrix products": ("nvjet", "gemm", "cutlass", "wmma", "splitK"),
        "attention": ("fmha", "flash", "efficient"),
        "4-bit weights unpacked": ("nf4", "dequant", "kDequantize"),
        "moving and adding": ("copy", "elementwise", "Memcpy", "Memset", "Fill", "cat", "reduce"),
        "between processes": ("nccl",),
    }
    order = ("attention", "4-bit weights unpacked", "between processes", "matrix products", "moving and adding")
    return next((name for name in order if any(word in kernel for word in parts[name])), "norms, activations, loss")


@app.command()
def peak(out: Path) -> None:
    """The GPU's own fp16 matrix peak, in TFLOP/s: the median of five windows of twenty products of 8,192 x 8,192."""
    import torch

    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    windows = []
    for window in range(6):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        for _ in range(20):
            left @ right
        end.record()
        torch.cuda.synchronize()
        if window:
            windows.append(round(20 * 2 * size**3 / (start.elapsed_time(end) / 1e3) / 1e12, 1))
    write_json(out, {"windows": windows, "tflops": statistics.median(windows)})


def _run(arguments: list[str]) -> str | None:
    """`python -m benchmarks.train ...` in a fresh process; the last line of what went wrong, or None."""
    command = [sys.executable, "-m", "benchmarks.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1][:300]


def ratios(evidence: dict) -> dict:
    """The headline figures, from the configurations and the matrix peak; what was not measured is left out."""
    cases = evidence["configurations"]
    speed = {name: case["tokens_per_second"] for name, case in cases.items()}
    kernel = {name: case["kernels"]["tokens_per_second"] for name, case in cases.items() if case.get("kernels")}
    found: dict = {}
    if "ours" in speed:
        found["reserved_gib"] = max(case["reserved_gib"] or 0 for case in cases.values())
        for key, peer in (("tutorial", "tutorial"), ("plain", "plain")):
            if peer in speed:
                found[f"ratio_vs_{key}"] = round(speed["ours"] / speed[peer], 2)
            if peer in kernel and "ours" in kernel:
                found[f"kernel_ratio_vs_{key}"] = round(kernel["ours"] / kernel[peer], 2)
        if "peak" in evidence:
            flops, tflops = cases["ours"]["flops_per_token"], evidence["peak"]["tflops"] * 1e12
            found["peak_share"] = round(speed["ours"] * flops / tflops, 3)
            if "ours" in kernel:
                found["kernel_peak_share"] = round(kernel["ours"] * flops / tflops, 3)
    return found


@app.command()
def measure(
    standin: Path,
    rows: Annotated[Path, typer.Option(help="Training rows, JSONL; repeated to 500.")],
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    quick: Annotated[bool, typer.Option(help="Only what the headline needs.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only these configurations.")] = None,
) -> None:
    """Measure every configuration, each in a fresh process, and write OUT after each."""
    names = only or (QUICK if quick else tuple(CASES))
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    evidence: dict = {key: before[key] for key in ("two_gpus", "ratio_two_gpus") if key in before} | {
        "what": "training, non-padding tokens per second: 8B shapes, 4-bit, fp16, T4 attention, at most 14.0 GiB",
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": [gpu.name for gpu in gpus()],
        "processors": os.cpu_count(),
        "versions": {p: installed(p) for p in ("torch", "unsloth", "unsloth_zoo", "transformers", "trl", "peft",
                                               "bitsandbytes", "accelerate", "xformers")},
        "configurations": {},
        "failed": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        if gpus():
            for name, arguments in (("peak", []), ("boundary", [str(standin), str(rows)])):
                wrong = _run([name, *arguments, str(place / f"{name}.json")])
                if wrong:
                    evidence["failed"][name] = wrong
                else:
                    evidence[name] = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
        for name in names:
            started = time.monotonic()
            arguments = ["case", name, str(standin), str(rows), str(place / "case.json"), str(place / name)]
            wrong = _run(arguments)
            if wrong:
                evidence["failed"][name] = wrong
            else:
                result = json.loads((place / "case.json").read_text(encoding="utf-8"))
                evidence["configurations"][name] = {**result, "whole_seconds": round(time.monotonic() - started, 1)}
            evidence |= ratios(evidence)
            write_json(out, evidence)
            print(name, wrong or f"{evidence['configurations'][name]['tokens_per_second']:,.0f} tokens/s", flush=True)
    print(json.dumps(ratios(evidence)))
    raise typer.Exit(bool(evidence["failed"]))


START, END = "<!-- benchmarks.train table -->", "<!-- end of the table -->"


def markdown_table(evidence: dict) -> str:
    """The README's table: each configuration's tokens per second by wall time and by kernel time, its memory and fit."""
    lines = ["| configuration | tokens/s | by kernel time | GiB reserved | micro-batch, layers that recompute |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, case in evidence["configurations"].items():
        kernel = f"{case['kernels']['tokens_per_second']:,.0f}" if case.get("kernels") else ""
        fit = case["fit"]
        cut = f"{fit['per_device_train_batch_size']} x {fit['gradient_accumulation_steps']}, {fit['recompute_layers']}"
        bold = "**" if name == "ours" else ""
        speed = f"{bold}{case['tokens_per_second']:,.0f}{bold}"
        lines.append(f"| {bold}{name}{bold}: {case['what']} | {speed} | {kernel} | {case['reserved_gib']} | {cut} |")
    return "\n".join(lines)


def draw(evidence: dict, path: Path) -> None:
    """Bars of wall and kernel speed for each configuration, and where the GPU's time goes in ours."""
    from matplotlib.figure import Figure

    cases = evidence["configurations"]
    figure = Figure(figsize=(10, 0.45 * len(cases) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    places = range(len(cases))
    wall = [case["tokens_per_second"] for case in cases.values()]
    kernel = [case.get("kernels", {}).get("tokens_per_second", 0) for case in cases.values()]
    left.barh([p - 0.2 for p in places], wall, 0.38, label="wall time", color="#d1495b")
    left.barh([p + 0.2 for p in places], kernel, 0.38, label="kernel time alone", color="#98a2b3")
    left.set_yticks(list(places), list(cases))
    left.invert_yaxis()
    left.set(title="Training, tokens per second", xlabel="8B shapes, 4-bit, fp16, T4's limits")
    share = cases["ours"]["kernels"]["share"] if cases.get("ours", {}).get("kernels") else {}
    right.barh(list(share), [100 * part for part in share.values()], 0.6, color="#30638e")
    right.invert_yaxis()
    right.set(title="Ours: what the GPU does", xlabel="% of the sum of kernel times")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=2)
    figure.savefig(path, dpi=150)


@app.command()
def table(evidence: Path, readme: Annotated[Path | None, typer.Option(help="Write it into this file.")] = None) -> None:
    """Print the table of EVIDENCE, draw the plot beside it, and put the table into a README between its two marks."""
    found = json.loads(evidence.read_text(encoding="utf-8"))
    draw(found, evidence.with_suffix(".png"))
    text = markdown_table(found)
    print(text)
    if readme is not None:
        before, _, rest = readme.read_text(encoding="utf-8").partition(START)
        _, _, after = rest.partition(END)
        readme.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


@app.command()
def two_gpus(
    standin: Path,
    rows: Annotated[Path, typer.Option(help="Training rows, JSONL.")],
    out: Annotated[Path, typer.Option(help="The evidence of `measure`, to which this is added.")],
    steps: Annotated[int, typer.Option(help="Updates of each run.")] = 24,
) -> None:
    """Notebook 03 itself, profile t4, on one GPU and then on two of the same machine; exit 1 where a run failed."""
    from benchmarks.series import run_series, summarise

    settings = {"model.name": standin.resolve(), "data.path": rows.resolve(), "data.eval_rows": 16, "data.train_rows": 80,
                "train.num_train_epochs": 100, "train.max_steps": steps, "evaluate.benchmark.name": "null",
                "evaluate.primary": "nll", "hardware.emulate_t4": "true", "hardware.pins": "report"}  # fmt: skip
    found: dict = {"gpu": [gpu.name for gpu in gpus()], "date": datetime.now(UTC).date().isoformat(), "failed": []}
    with tempfile.TemporaryDirectory() as scratch:
        for count in (1, 2):
            run_dir = Path(scratch) / str(count)
            status = run_series(run_dir, {**settings, "hardware.processes": count}, only=("00", "02", "03"))
            summary = run_dir / "training" / "summary.json"
            if status or not summary.exists():
                found["failed"].append(summarise(run_dir))
                break
            told = json.loads(summary.read_text(encoding="utf-8"))
            found[f"{count} GPU"] = {
                **told,
                "seconds_per_update": round(statistics.median(told["update_seconds"][2:]), 4),
                "losses": summarise(run_dir)["training"]["losses"],
            }
    if not found["failed"]:  # the same packs in every update
        one, two = (found[f"{count} GPU"]["seconds_per_update"] for count in (1, 2))
        found["ratio"] = round(one / two, 3)
    evidence = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    write_json(out, evidence | {"two_gpus": found, "ratio_two_gpus": found.get("ratio")})
    print(json.dumps({key: found.get(key) for key in ("ratio", "failed")}))
    raise typer.Exit(bool(found["failed"]))


if __name__ == "__main__":
    app()
