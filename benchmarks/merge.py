"""The merge against reading and writing the same shards once: time, peak memory, and whether both models agree.

    python -m benchmarks.standin /tmp/standin-8b
    python -m benchmarks.merge /tmp/standin-8b --out benchmarks/results/merge.json

A random adapter of rank 16 on every projection is folded into BASE in a process of its own, whose peak resident memory
is the kernel's figure. The same shards are read and written without arithmetic, from front to back. Each is measured
--rounds times, in turn; the ratio is that of the best merge to the best copy, and every time is in the evidence. Every
shard has been read once before the first pass, so that all start from the same cache. It all happens in a temporary folder below --scratch and goes with it; the
evidence goes to --out. Then adapter on 16-bit base and merged model continue the same prompts greedily (--prompts 0
leaves that out: float32 needs twice the model's size).
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from utils.data import synthetic as demo_data
from utils.data.prompts import format_prompt
from utils.export.compare_logits import check_tolerance, compare, continue_greedily, follow
from utils.export.merge import find_shards, list_tensors, merge_shards, read_lora
from utils.files import sha256, write_json
from utils.hardware import GIB, gpus, installed
from utils.models.memory import free_memory
from utils.models.tokenizer import load_tokenizer
from utils.schema import LoraSection

_CHUNK = 16 * 2**20
RANK = 16


def write_adapter(base: Path, folder: Path, seed: int = 0) -> None:
    """A LoRA of random factors on all seven projections of `base`, as peft would have saved it."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    targets = LoraSection().target_modules
    LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    ).save_pretrained(str(folder))
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for stored, (_, _, shape) in list_tensors(find_shards(base)).items():
        if stored.split(".")[-2] in targets:
            name, (rows, columns) = f"base_model.model.{stored.removesuffix('.weight')}", shape
            # About what training leaves: changes some hundredth of the weights' own size.
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / math.sqrt(columns)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 2e-3
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def copy_front_to_back(shards: list[Path], target: Path) -> None:
    """Read and write every shard once, in order, on one thread."""
    for shard in shards:
        with shard.open("rb") as source, (target / shard.name).open("wb") as output:
            while chunk := source.read(_CHUNK):
                output.write(chunk)


def timed(function, *arguments) -> float:
    """Seconds that a call takes."""
    started = time.monotonic()
    function(*arguments)
    return time.monotonic() - started


def merge_in_own_process(base: Path, adapter: Path, target: Path) -> dict[str, float]:
    """Seconds of the merge itself, and peak resident GiB of the whole process, imports included."""
    command = [sys.executable, "-m", "benchmarks.merge", "--only-merge", str(base), str(adapter), str(target)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    return json.loads(answer.stdout.strip().splitlines()[-1])


def _only_merge(base: Path, adapter: Path, target: Path) -> None:
    import torch  # noqa: F401  imported before the clock starts, as in a notebook

    lora = read_lora(adapter)
    target.mkdir()
    seconds = timed(merge_shards, base, lora, target)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
    print(json.dumps({"seconds": seconds, "peak_rss_gib": peak}))


def agree(base: Path, adapter: Path, merged: Path, prompts: int) -> dict:
    """Greedy tokens and logits of the merged model against the adapter on the 16-bit base, on the GPU where there is one.

    In float32 what differs is the one rounding of the merged weights, in bfloat16 that of every step as well. Random
    weights leave the best two tokens close together, so they part sooner than a trained model's.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device, tokenizer = "cuda" if torch.cuda.is_available() else "cpu", load_tokenizer(base)
    texts = [format_prompt(row["Question"], "native") for row in demo_data.base_rows(prompts)]
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        load = {"dtype": dtype, "device_map": {"": device}}
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(str(base), trust_remote_code=False, **load), str(adapter)
        ).eval()
        leader = continue_greedily(model, tokenizer, texts, "adapter on base")
        del model
        free_memory()
        model = AutoModelForCausalLM.from_pretrained(str(merged), trust_remote_code=False, **load).eval()
        found = compare(leader, follow(model, tokenizer, texts, leader, "merged"))
        del model
        free_memory()
        figures[str(dtype).removeprefix("torch.")] = found | {"problem": check_tolerance(found, "bfloat16")}
    return figures


def main(
    base: Annotated[Path, typer.Argument(help="A 16-bit model folder, such as the stand-in.")],
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    scratch: Annotated[Path | None, typer.Option(help="Where to write; needs the model's size twice.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts on which both are compared; 0: none.")] = 8,
    rounds: Annotated[int, typer.Option(help="How often each way is measured; the best counts.")] = 3,
) -> None:
    """Measure and write OUT."""
    shards = find_shards(base)
    sizes = [shard.stat().st_size for shard in shards]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = Path(folder)
        write_adapter(base, place / "adapter")
        timed(copy_front_to_back, shards, _made(place / "copy"))  # every pass after this one finds the same cache
        seconds: dict[str, list[float]] = {"front_to_back": [], "merge": []}
        peaks, digests = [], []
        for _ in range(rounds):
            seconds["front_to_back"].append(timed(copy_front_to_back, shards, _made(place / "copy")))
            shutil.rmtree(place / "merged", ignore_errors=True)
            figures = merge_in_own_process(base, place / "adapter", place / "merged")
            seconds["merge"].append(figures["seconds"])
            peaks.append(figures["peak_rss_gib"])
            digests.append([sha256(place / "merged" / shard.name) for shard in shards])
        best = {name: min(values) for name, values in seconds.items()}
        for file in base.glob("*.json"):
            if not (place / "merged" / file.name).exists():
                shutil.copy(file, place / "merged")
        evidence = {
            "what": "LoRA of rank 16 on all seven projections folded into 16-bit shards, against copying them",
            "date": datetime.now(UTC).date().isoformat(),
            "gib": round(sum(sizes) / GIB, 2),
            "shards": len(shards),
            "largest_shard_gib": round(max(sizes) / GIB, 2),
            "processors": len(os.sched_getaffinity(0)),
            "gpu": [gpu.name for gpu in gpus()],
            "versions": {name: installed(name) for name in ("torch", "safetensors", "peft", "transformers")},
            "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
            "time_ratio": round(best["merge"] / best["front_to_back"], 3),
            "peak_rss_gib": round(max(peaks), 3),
            "merges_are_identical": all(digest == digests[0] for digest in digests),
        }
        write_json(out, evidence)
        if prompts:
            evidence["agreement"] = agree(base, place / "adapter", place / "merged", prompts)
            write_json(out, evidence)
    print(json.dumps(evidence, indent=2))


def _made(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only-merge"]:
        _only_merge(*map(Path, sys.argv[2:]))
    else:
        typer.run(main)
