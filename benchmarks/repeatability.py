"""What a CUDA GPU repeats: twenty updates of profile t4's training, three times over, same seed, a fresh process each.

    python -m benchmarks.standin /tmp/standin-8b
    python -m benchmarks.repeatability measure /tmp/standin-8b --out benchmarks/results/repeatability.json

About three minutes on an H200. Notebook 03's own functions train the stand-in through unsloth: 4-bit, fp16, packed, a T4's
limits, the schedule left as if it went on. `--rows rows.jsonl` takes rows of the training data instead of the demo's. The
first process finds the step plan by trials and the others take it from file, as a run does that is continued. Exit 1 where a
repeat failed, or where the losses after the last update lie further apart than the tolerance.
Without a GPU it is a dry run in float32 on the plain backend (`--size tiny` for the stand-in, `--steps 3`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.evidence import where
from utils.files import sha256, write_json
from utils.hardware import GIB

app = typer.Typer()
TOLERANCE = 1e-3  # nats per token; fixed before anything was measured
STEPS, REPEATS = 20, 3
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


def stop_after(trainer, steps: int) -> None:
    """End the training after `steps` updates, the schedule left as if it went on."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= steps

    trainer.add_callback(Stop())


@app.command()
def once(standin: Path, rows: Path, run_dir: Path, out: Path, adapter: Path, steps: int = STEPS) -> None:
    """One training in this process: writes OUT, JSON, and the trained LoRA weights to ADAPTER, safetensors."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.train_cases import prepare
    from utils.hardware import describe_determinism
    from utils.models.load import is_unsloth
    from utils.training.step_plan import choose_plan, recompute_as

    started = time.monotonic()
    run, model, tokenizer, frame, make_trainer = prepare("ours", standin, rows, run_dir, 500)
    plan = choose_plan(run, model, tokenizer, frame, make_trainer)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(model, tokenizer, run.config, frame, plan, scratch)
        recompute_as(trainer, run.config, plan)
        stop_after(trainer, steps)
        trainer.train()
    trained = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, adapter)
    result = {
        "losses": [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "grad_norms": [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry],
        "adapter_sha256": sha256(adapter),
        "trained_weights": sum(value.numel() for value in trained.values()),
        "seed": run.config.train.seed,
        "fit": asdict(plan),
        "packed": bool(run.config.train.packing and is_unsloth(model)),
        "backend": "unsloth" if is_unsloth(model) else "transformers",
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if torch.cuda.is_available() else None,
        "seconds": round(time.monotonic() - started, 1),
        "determinism": describe_determinism(),
    }
    write_json(out, result)


def compare(results: list[dict], adapters: list[Path]) -> dict:
    """What the repeats have in common: spread of the loss at each step (nats), adapters bit by bit and weight by weight."""
    from safetensors.torch import load_file

    spreads = [max(step) - min(step) for step in zip(*(result["losses"] for result in results), strict=True)]
    first, *others = (load_file(path) for path in adapters)
    apart = [
        float((other[name].float() - value.float()).abs().max()) for other in others for name, value in first.items()
    ]
    return {
        "max_loss_difference": spreads[-1],
        "max_loss_difference_at_any_step": max(spreads),
        "within_tolerance": spreads[-1] <= TOLERANCE,
        "losses_bit_identical": max(spreads) == 0.0,
        "adapters_bit_identical": len({result["adapter_sha256"] for result in results}) == 1,
        "max_weight_difference": max(apart),
        "loss_per_step_spread": spreads,
    }


@app.command()
def measure(
    standin: Path,
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    rows: Annotated[Path | None, typer.Option(help="Rows of the training data, JSONL; the demo's otherwise.")] = None,
    steps: Annotated[int, typer.Option(help="Updates of each repeat.")] = STEPS,
) -> None:
    """Train STANDIN three times for as many updates, compare, and write OUT; exit 1 beyond the tolerance."""
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        rows = rows or _demo_rows(place / "rows.jsonl")
        adapters = [place / f"adapter-{number}.safetensors" for number in range(REPEATS)]
        for number, adapter in enumerate(adapters):
            told = place / f"{number}.json"
            arguments = ["once", standin, rows, place / "run", told, adapter, "--steps", steps]
            command = [sys.executable, "-m", "benchmarks.repeatability", *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stderr.write(done.stderr)
                raise typer.Exit(1)
            results.append(json.loads(told.read_text(encoding="utf-8")))
            print(f"repeat {number + 1}: loss {results[-1]['losses'][-1]!r}, {results[-1]['seconds']} s", flush=True)
        shared = compare(results, adapters)
    shape = json.loads((standin / "config.json").read_text(encoding="utf-8"))
    same = ("seed", "fit", "packed", "backend", "trained_weights", "determinism")
    evidence = {
        "what": "profile t4's training, same seed, a fresh process each: loss in nats per token after each update",
        **where(),
        "model": {name: shape[name] for name in SHAPE},
        "steps": steps,
        "repeats": REPEATS,
        "tolerance": TOLERANCE,
        **shared,
        "losses": [result["losses"] for result in results],
        "grad_norms": [result["grad_norms"] for result in results],
        "adapter_sha256": [result["adapter_sha256"] for result in results],
        "seconds": [result["seconds"] for result in results],
        "reserved_gib": [result["reserved_gib"] for result in results],
        **{key: results[0][key] for key in same},
        "same_conditions": all(result[key] == results[0][key] for result in results for key in same),
    }  # fmt: skip
    write_json(out, evidence)
    print(json.dumps({key: evidence[key] for key in (*shared, "same_conditions") if key != "loss_per_step_spread"}))
    raise typer.Exit(not (shared["within_tolerance"] and evidence["same_conditions"]))


def _demo_rows(path: Path) -> Path:
    """The demo's training rows as JSONL."""
    from utils.data import synthetic as demo_data

    lines = [json.dumps(row, ensure_ascii=False) for row in demo_data.tuning_rows("train", 500)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    app()
