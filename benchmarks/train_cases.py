"""What `benchmarks.train` measures, each part in a fresh process: `python -m benchmarks.train_cases NAME ...`.

Notebook 03's own functions on the 8B-shaped stand-in: the speed of one configuration, whether a packed row sees its
neighbour, what more rows cost, and the GPU's own matrix peak.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import typer

from benchmarks.peers import CASES, largest_plan, pack_without_unsloth, settings_of, use_attention
from benchmarks.recipe import format_rows, notebook_functions
from utils.config import load_config
from utils.files import write_json
from utils.hardware import GIB

app = typer.Typer()
WARM_UP, WINDOW, WINDOWS, PROFILED = 2, 3, 3, 3  # of the last three updates one tells the operations
GROWTH = (500, 2000, 8000)


def prepare(name: str, standin: Path, rows: Path, run_dir: Path, count: int):
    """(run, model, tokenizer, rows, make_trainer) of a case, with LoRA, as notebook 03 has them."""
    from utils.pipeline.stage import StageRun
    from utils.pipeline.stages import BY_NAME

    profile, settings = settings_of(name, standin)
    config = load_config(profile, settings)
    use_attention(CASES[name].get("attention", "ours"))
    load_with_lora, make_trainer = notebook_functions()
    if CASES[name].get("pack"):
        make_trainer = pack_without_unsloth(make_trainer)
    model, tokenizer = load_with_lora(config)
    frame = format_rows(rows, tokenizer, config, count)
    (run_dir / "training").mkdir(parents=True, exist_ok=True)
    return StageRun(run_dir, config, BY_NAME["03_lora_training"]), model, tokenizer, frame, make_trainer


@app.command()
def case(name: str, standin: Path, rows: Path, out: Path, run_dir: Path, count: int = 500) -> None:
    """One configuration, in this process: writes OUT, JSON."""
    import torch

    from utils.training import step_plan
    from utils.training.callbacks import Stopwatch

    started = time.monotonic()
    run, model, tokenizer, frame, make_trainer = prepare(name, standin, rows, run_dir, count)
    config, loaded, cuda = run.config, time.monotonic(), torch.cuda.is_available()
    micro_batches = (lambda rows: [1]) if CASES[name].get("one") else step_plan._divisors
    with mock.patch.object(step_plan, "_divisors", micro_batches):
        plan = step_plan.choose_plan(run, model, tokenizer, frame, make_trainer)
    if CASES[name].get("largest"):
        plan = largest_plan(plan, model, tokenizer, config, frame, make_trainer)
    tried = time.monotonic()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    measured = WARM_UP + WINDOW * WINDOWS
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(model, tokenizer, config, frame, plan, scratch)
        prepared = time.monotonic()
        trainer.args.max_steps = measured + (PROFILED if cuda else 0)
        step_plan.recompute_as(trainer, config, plan)
        watch = Stopwatch(trainer)
        profiler = _Profiler(trainer, measured) if cuda else None
        trainer.train()
    windows = _windows(watch)
    trials = json.loads(run.file(step_plan.FILE).read_text(encoding="utf-8"))["trials"]
    result = {
        "what": CASES[name]["what"],
        "windows": windows,
        "tokens_per_second": statistics.median(windows),
        "tokens_per_update": round(statistics.mean(watch.tokens[:measured])),
        "fit": asdict(plan),
        "packed": bool(trainer.args.packing),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if cuda else None,
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if cuda else None,
        "flops_per_token": flops_per_token(model.config, plan.recompute_layers),
        "seconds": {"load": round(loaded - started, 1), "trials": round(tried - loaded, 1),
                    "prepare": round(prepared - tried, 1), "first_update": round(watch.ends[0] - prepared, 1)},
        "trials": [{"fit": trial.pop("step_plan"), **trial} for trial in trials],
    }  # fmt: skip
    if profiler is not None:
        result["kernels"] = profiler.summary(watch.tokens[measured:-1])
        result["operations"] = profiler.operations(config.lora.r, model.config.vocab_size)
    write_json(out, result)


def _windows(watch) -> list[float]:
    """Tokens per second of each window of updates after the warm-up."""
    found = []
    for first in range(WARM_UP, WARM_UP + WINDOW * WINDOWS, WINDOW):
        seconds = watch.ends[first + WINDOW - 1] - watch.ends[first - 1]
        found.append(round(sum(watch.tokens[first : first + WINDOW]) / seconds, 1))
    return found


@app.command()
def boundary(name: str, standin: Path, rows: Path, out: Path) -> None:
    """Whether a packed row sees its neighbour: logits and gradients of two rows, packed and alone; writes OUT, JSON."""
    import torch

    from utils.models.load import is_unsloth

    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"  # unsloth returns none in training otherwise
    with tempfile.TemporaryDirectory() as scratch:
        _, model, tokenizer, frame, _ = prepare(name, standin, rows, Path(scratch), 2)
    texts = (frame["prompt"] + frame["completion"]).str[:2000]
    first, second = (tokenizer(text, return_tensors="pt").input_ids[:, :250].to(model.device) for text in texts)
    model.train()

    def look(ids, lengths) -> tuple:
        """The second row's logits and what its loss asks of the first LoRA matrix."""
        model.zero_grad(set_to_none=True)
        places = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(model.device)
        # Without unsloth the positions alone tell where a document begins.
        told = is_unsloth(model) and len(lengths) > 1
        packed = {"packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)} if told else {}
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


@app.command()
def growth(standin: Path, rows: Path, out: Path) -> None:
    """What more rows cost: seconds to pack them, then speed and memory (GiB) of updates; writes OUT, JSON."""
    import psutil
    import torch

    from utils.training.callbacks import Stopwatch
    from utils.training.step_plan import StepPlan, recompute_as

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        run, model, tokenizer, _, make_trainer = prepare("ours", standin, rows, Path(scratch) / "run", 1)
        # One way to compute an update for every number of rows; nothing but that number differs.
        plan = StepPlan(1, run.config.train.rows_per_update, model.config.num_hidden_layers)
        for count in GROWTH:
            frame = format_rows(rows, tokenizer, run.config, count)
            started = time.monotonic()
            trainer = make_trainer(model, tokenizer, run.config, frame, plan, str(Path(scratch) / str(count)))
            prepared = time.monotonic() - started
            trainer.args.max_steps = WARM_UP + WINDOW * WINDOWS
            recompute_as(trainer, run.config, plan)
            watch = Stopwatch(trainer)
            held = psutil.Process().memory_info().rss / GIB
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
            windows = _windows(watch)
            found[count] = {
                "prepare_seconds": round(prepared, 1),
                "packs": len(trainer.train_dataset),
                "windows": windows,
                "tokens_per_second": statistics.median(windows),
                "host_rss_gib": round(held, 2),
                "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if torch.cuda.is_available() else None,
            }
    write_json(out, found)


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
    """torch's profiler over the updates after the first `skip`: kernels of all but the last, operations of the last."""

    def __init__(self, trainer, skip: int):
        import torch
        from transformers import TrainerCallback

        cpu, cuda = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
        self.profiler = torch.profiler.profile(activities=[cuda])
        self.shapes = torch.profiler.profile(activities=[cpu, cuda], record_shapes=True)
        last, ours = skip + PROFILED - 1, self

        class Switch(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                torch.cuda.synchronize()
                if state.global_step == skip:
                    ours.profiler.__enter__()
                if state.global_step == last:
                    ours.shapes.__enter__()

            def on_step_end(self, args, state, control, **_):
                torch.cuda.synchronize()
                if state.global_step == last:
                    ours.profiler.__exit__(None, None, None)
                if state.global_step == last + 1:
                    ours.shapes.__exit__(None, None, None)

        trainer.add_callback(Switch())

    def summary(self, tokens: list[int]) -> dict:
        # What goes to and from main memory overlaps with arithmetic; calls of the driver take the GPU no time.
        events = [event for event in self.profiler.key_averages() if event.self_device_time_total > 0]
        events = [event for event in events if not event.key.startswith(("Memcpy HtoD", "Memcpy DtoH"))]
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

    def operations(self, rank: int, vocabulary: int) -> dict[str, list]:
        """What one update asks of the GPU: [calls, milliseconds] of each kind of operation, the longest first."""
        found: dict[str, list] = {}
        for event in self.shapes.key_averages(group_by_input_shape=True):
            kind = _kind_of(event.key, event.input_shapes, rank, vocabulary)
            if kind is not None and event.self_device_time_total > 0:
                calls, milliseconds = found.get(kind, (0, 0.0))
                found[kind] = [calls + event.count, milliseconds + event.self_device_time_total / 1e3]
        ranked = sorted(found.items(), key=lambda entry: -entry[1][1])
        return {kind: [calls, round(milliseconds, 1)] for kind, (calls, milliseconds) in ranked}


_KINDS = {  # by operation, and by kernel where unsloth's Triton kernels are launched without one
    "attention": ("aten::_efficient_attention", "aten::_scaled_dot", "flash", "flex", "triton_tem_fused_flex"),
    "4-bit weights unpacked": ("_nf4_dequant_kernel", "bitsandbytes::dequantize"),
    "norms, rotary positions, activations": ("_rms_layernorm", "_rope_embedding", "_fg_kernel", "_DWf_DW_dfg"),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::cat", "aten::fill_", "aten::zero_"),
    "adding": ("aten::add", "aten::sum", "aten::mul"),
    "loss": ("triton_",),
    "optimizer": ("bitsandbytes::optimizer", "aten::_fused_adam", "aten::_foreach", "aten::_amp"),
    "all else": ("aten::",),
}


def _kind_of(name: str, shapes: list, rank: int, vocabulary: int) -> str | None:
    """The kind of an operation by its name and its inputs' shapes; None for what another one holds already."""
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        sizes = {size for shape in shapes for size in shape}
        return "output head" if vocabulary in sizes else "LoRA's products" if rank in sizes else "base model's products"
    return next((kind for kind, starts in _KINDS.items() if name.startswith(starts)), None)


def _part_of(kernel: str) -> str:
    """Which part of the work a kernel belongs to, by its name."""
    parts = {
        "matrix products": ("nvjet", "gemm", "cutlass", "wmma", "splitK"),
        "attention": ("fmha", "flash", "efficient", "flex"),
        "4-bit weights unpacked": ("nf4", "dequant", "kDequantize"),
        "moving and adding": ("copy", "elementwise", "Memcpy", "Memset", "Fill", "cat", "reduce"),
        "between processes": ("nccl",),
    }
    order = ("attention", "4-bit weights unpacked", "between processes", "matrix products", "moving and adding")
    return next((name for name in order if any(word in kernel for word in parts[name])), "norms, activations, loss")


if __name__ == "__main__":
    app()
