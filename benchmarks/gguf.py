"""A run's GGUF files in llama.cpp and in transformers, against its merged model.

    LLAMA_CPP_DIR=~/llama.cpp python -m benchmarks.gguf runs/demo --out benchmarks/results/gguf.json

It writes f16, q8_0, q4_k_m and the LoRA's GGUF anew, from the run's export/merged and export/adapter, and compares
greedy tokens on 20 held-out prompts; and it runs the line of the card.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from benchmarks.llama_cpp import SOURCE
from utils.data.prompts import format_prompt
from utils.errors import HardwareError
from utils.export.adapter import find_base, save_tokenizer
from utils.export.compare_logits import compare, continue_greedily, follow
from utils.export.gguf import (
    LORA,
    check_gguf,
    continue_in_llama_cpp,
    convert,
    file_name,
    find_llama_cpp,
    find_program,
    name_pre_tokenizer,
    serve,
)
from utils.export.model_card import make_card
from utils.export.places import export_folders
from utils.files import write_json
from utils.hardware import installed
from utils.models.load import load_plain
from utils.models.tokenizer import load_tokenizer
from utils.pipeline.run_dir import RunDir, open_run

_PROMPTS = 20
_KINDS = ("f16", "q8_0", "q4_k_m")


def measure(run_dir: Path, folder: Path) -> dict:
    """Write the files into `folder` and compare; returns the evidence."""
    run, tree = open_run("auto", run_dir), find_llama_cpp()
    if tree is None:
        raise HardwareError("No llama.cpp was found; set LLAMA_CPP_DIR.")
    folders, style = export_folders(run), run.config.prompt
    questions = pd.read_parquet(run.file("data/eval.parquet")).head(_PROMPTS)["Question"]
    prompts = [format_prompt(question, style) for question in questions]
    tokenizer = load_tokenizer(folders["merged"])
    reference = continue_greedily(load_plain(run.config, str(folders["merged"])), tokenizer, prompts, "merged")
    convert(tree, folders["merged"], folders["adapter"], folder, _KINDS)
    return {
        "what": "GGUF files of a run against its merged model: greedy tokens on held-out prompts",
        "date": datetime.now(UTC).date().isoformat(),
        "profile": run.config.profile,
        "versions": {name: installed(name) for name in ("torch", "transformers", "gguf", "sentencepiece")},
        "llama.cpp from": SOURCE,
        "pre_tokenizer": name_pre_tokenizer(folders["merged"] / "tokenizer.json"),
        "megabytes": {path.name: round(path.stat().st_size / 1e6, 3) for path in sorted(folder.glob("*.gguf"))},
        "llama.cpp": {
            kind: check_gguf(tree, folder / file_name(kind), tokenizer, prompts, reference, None) for kind in _KINDS
        },
        "transformers": read_by_transformers(folder, tokenizer, prompts, reference),
        "lora_on_base": lora_on_base(run, folder, tokenizer, prompts, reference),
        "card_line": run_card_line(run, folder, tokenizer),
    }


def read_by_transformers(folder: Path, tokenizer, prompts, reference) -> dict:
    """The f16 file as transformers reads it, weights and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load = {"gguf_file": file_name("f16")}
    model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False, **load).eval()
    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **load)
    same_ids = sum(theirs(prompt).input_ids == tokenizer(prompt).input_ids for prompt in prompts)
    figures = compare(reference, follow(model, tokenizer, prompts, reference, "transformers"))
    return figures | {"prompts_with_the_same_ids_by_its_own_tokenizer": same_ids}


def lora_on_base(run: RunDir, folder: Path, tokenizer, prompts, reference) -> dict:
    """The LoRA's GGUF on the base's GGUF in llama.cpp, against the merged model."""
    import shutil

    base, tree = find_base(run.config)[0], find_llama_cpp()
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(scratch) / "base"
        shutil.copytree(base, copied)
        save_tokenizer(run, copied)
        convert(tree, copied, run.file("export/adapter"), Path(scratch), ["f16"])
        same = 0
        with serve(tree, Path(scratch) / file_name("f16"), lora=folder / LORA) as client:
            for number, prompt in enumerate(prompts):
                tokens = continue_in_llama_cpp(client, tokenizer(prompt).input_ids)
                ours = [token for token in reference.tokens[number] if token != tokenizer.eos_token_id]
                same += [token for token in tokens if token != tokenizer.eos_token_id] == ours
    return {"prompts": len(prompts), "identical": same}


def run_card_line(run: RunDir, folder: Path, tokenizer) -> dict:
    """The card's llama-completion line, run in the folder with its f16 file; and what transformers answers to it."""
    card = str(make_card(run, "gguf", {"gguf": folder}, {}))
    line = re.search(r"^llama-completion .*", card, re.MULTILINE)[0].replace(file_name("q4_k_m"), file_name("f16"))
    words = shlex.split(line)
    program = find_program(find_llama_cpp(), words[0])
    done = subprocess.run(
        [str(program), *words[1:], "--no-display-prompt"], cwd=folder, stdin=subprocess.DEVNULL,
        capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=600,
    )  # fmt: skip
    question = re.search(r"Which .*?\?", line).group(0)
    merged = load_plain(run.config, str(export_folders(run)["merged"]))
    prompt = format_prompt(question, run.config.prompt)
    ours = continue_greedily(merged, tokenizer, [prompt], "card").tokens[0]
    text = tokenizer.decode(ours, skip_special_tokens=True).strip()
    said = done.stdout.replace("[end of text]", "").strip()
    return {"line": line, "exit_status": done.returncode, "said": said, "same_as_transformers": said.startswith(text)}


def main(run_dir: Path, out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")]) -> None:
    """Measure and write OUT."""
    with tempfile.TemporaryDirectory() as folder:
        evidence = measure(run_dir, Path(folder))
    write_json(out, evidence)


if __name__ == "__main__":
    typer.run(main)
