"""Exports that were loaded back: the adapter in one folder, the merged model in another, a check of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import pandas as pd

from utils.errors import ModelError
from utils.files import atomic_folder, digests, record_files, write_text
from utils.models import free_memory, load_plain, load_tokenizer, model_source, torch_dtype
from utils.platforms import require_disk, require_memory
from utils.progress import track
from utils.prompts import format_prompt
from utils.rundir import RunDir
from utils.settings import Config

NEW_TOKENS = 48  # greedy tokens compared for each prompt


def copy_adapter(run: RunDir) -> Path:
    """export/adapter: the trained adapter with its tokenizer, and nothing else beside it."""
    target = run.file("export/adapter")
    with atomic_folder(target) as folder:
        ignored = shutil.ignore_patterns("README.md", ".*")
        shutil.copytree(run.file("training/adapter"), folder, ignore=ignored, dirs_exist_ok=True)
    return target


def merge_adapter(run: RunDir) -> Path:
    """export/merged: adapter folded into the 16-bit base weights (float32 where the run computes so), on the CPU.

    Merging into the 4-bit weights would round twice (peft's bnb layers requantise). Raises HardwareError where the
    disk or main memory is too small, ModelError where a merged weight is not finite. A half-written folder never has the
    final name.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config, target = run.config, run.file("export/merged")
    source = sixteen_bit_source(config)
    dtype = torch.float32 if torch_dtype(config) == torch.float32 else torch.bfloat16
    shape = AutoConfig.from_pretrained(source, revision=_revision(config, source))
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(shape, dtype=dtype).num_parameters() * dtype.itemsize / 2**30
    instead = "The adapter is exported; run 05 elsewhere, or with export.merged=false."
    require_memory(size * 1.1, "Merging", instead)
    with atomic_folder(target) as folder:
        require_disk(run.path, size * 1.05 + 0.1, "The merged model")
        base = AutoModelForCausalLM.from_pretrained(source, revision=_revision(config, source), dtype=dtype)
        try:
            lora = PeftModel.from_pretrained(base, str(run.file("training/adapter")))
            merged = lora.merge_and_unload(safe_merge=True)
        except ValueError as error:  # safe_merge found NaN or infinity
            raise ModelError(
                f"The adapter cannot be merged: {error}; train again with a lower learning rate."
            ) from None
        merged.save_pretrained(str(folder), safe_serialization=True)
        load_tokenizer(model_source(config), config.model.revision).save_pretrained(str(folder))
    del base, lora, merged
    free_memory()
    return target


def set_merged_aside(run: RunDir) -> None:
    """Rename an earlier run's export/merged, so that it is not taken for this run's where merging is switched off."""
    merged, aside = run.file("export/merged"), run.file("export/merged.previous")
    if merged.exists():
        shutil.rmtree(aside, ignore_errors=True)
        merged.rename(aside)


def sixteen_bit_source(config: Config) -> str:
    """The base model in 16 bit: the configured one, or its sibling where that is a pre-quantised repository."""
    source = model_source(config)
    for suffix in ("-unsloth-bnb-4bit", "-bnb-4bit"):
        if not Path(source).exists() and source.endswith(suffix):
            return source.removesuffix(suffix)
    return source


def _revision(config: Config, source: str) -> str | None:
    return config.model.revision if source == config.model.name else None


def load_exported(run: RunDir, kind: str):
    """(model, tokenizer) from export/: `adapter` on the base, or `merged` on its own.

    Loaded by plain transformers and peft, as a stranger would, quantised as the run is: 8 B in 16 bit exceed a T4.
    """
    from peft import PeftModel

    folder = run.file(f"export/{kind}")
    if kind == "merged":
        model = load_plain(run.config.model_copy(update={"model": _local(run.config)}), str(folder))
    else:
        model = PeftModel.from_pretrained(load_plain(run.config, model_source(run.config)), str(folder))
    return model.eval(), load_tokenizer(folder)


def _local(config: Config):
    """The model section for a local folder: a revision names a commit on the Hub."""
    return config.model.model_copy(update={"revision": None})


def check_merged_weights(run: RunDir, modules: int = 12) -> dict[str, float | int]:
    """Compare merged weights with base + alpha/r * B @ A, computed here in float64, over evenly chosen modules.

    Returns how many were compared and the largest difference in units of the stored dtype's rounding. Raises
    ModelError where any differs by more than r units.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    lora = load_file(run.file("export/adapter/adapter_model.safetensors"))
    settings = json.loads(run.file("export/adapter/adapter_config.json").read_text())
    names = sorted(key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight"))
    names = names[:: max(1, len(names) // modules)]
    source = _base_folder(sixteen_bit_source(run.config), run.config)
    worst = 0.0
    for name in names:
        key = name.removeprefix("base_model.model.") + ".weight"
        base, merged = (_read_tensor(folder, key, safe_open) for folder in (source, run.file("export/merged")))
        b, a = (lora[f"{name}.lora_{side}.weight"].double() for side in "BA")
        scale = settings["lora_alpha"] / settings["r"]
        expected = base.double() + scale * (b @ a)
        # What rounding may do depends on the terms that were added, not on their sum, which can cancel.
        unit = torch.finfo(merged.dtype).eps * (base.double().abs() + scale * (b.abs() @ a.abs()))
        worst = max(worst, float(((merged.double() - expected).abs() / unit.clamp(min=1e-12)).max()))
    if worst > settings["r"]:  # r products are added for each entry
        raise ModelError(
            f"The merged weights differ from base plus adapter by {worst:.1f} units of rounding; run 05 again."
        )
    return {"modules": len(names), "largest_rounding_units": round(worst, 3)}


def _base_folder(source: str, config: Config) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=_revision(config, source), allow_patterns=["*.safetensors*"]))


def _read_tensor(folder: Path, key: str, safe_open):
    """One tensor of a possibly sharded safetensors folder."""
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][key] if index.exists() else "model.safetensors"
    with safe_open(folder / file, framework="pt") as tensors:
        return tensors.get_tensor(key)


def greedy_tokens(model, tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The first `NEW_TOKENS` greedy tokens for each prompt, one prompt at a time so that no padding is involved."""
    import torch

    answers = []
    for prompt in track(prompts, "comparing exports", unit="prompt"):
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers.append(output[0, inputs.input_ids.shape[1] :].tolist())
    return answers


def agreement(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> dict[str, float | int]:
    """How many prompts got the same tokens, and the mean length of the common beginning."""
    pairs = list(zip(first, second, strict=True))
    same = sum(list(a) == list(b) for a, b in pairs)
    common = [sum(1 for _ in takewhile(lambda t: t[0] == t[1], zip(a, b, strict=False))) for a, b in pairs]
    return {"prompts": len(first), "identical": same, "mean_common_tokens": round(sum(common) / len(common), 1)}


def export_prompts(run: RunDir) -> list[str]:
    """The held-out prompts that exports are compared on."""
    held_out = pd.read_parquet(run.file("data/eval.parquet")).head(run.config.export.prompts)
    return [format_prompt(question, run.config.prompt.style) for question in held_out["Question"]]


def verify_exports(run: RunDir) -> dict[str, dict]:
    """Load each export from disk and compare; returns figures by check.

    Raises ModelError where merged weights are not base plus adapter, or where the two give different tokens although
    nothing is quantised. In 4-bit they may differ: merged weights are quantised after merging, the base before.
    """
    prompts = export_prompts(run)
    model, tokenizer = load_exported(run, "adapter")
    from_adapter = greedy_tokens(model, tokenizer, prompts)
    del model
    free_memory()
    if not run.config.export.merged:
        return {"adapter": {"prompts": len(prompts), "answered": sum(bool(tokens) for tokens in from_adapter)}}
    model, tokenizer = load_exported(run, "merged")
    figures = agreement(from_adapter, greedy_tokens(model, tokenizer, prompts))
    del model
    free_memory()
    exact = not run.config.model.load_in_4bit and torch_dtype(run.config).itemsize == 4
    if exact and figures["identical"] < figures["prompts"]:
        raise ModelError(
            f"Adapter and merged model agree on {figures['identical']} of {figures['prompts']} prompts, expected all; "
            "delete export/ and run 05 again."
        )
    return {"adapter_and_merged": figures, "merged_weights": check_merged_weights(run)}


def write_card(run: RunDir) -> Path:
    """export/README.md: what was trained, on what, the measured comparison, and what it must not be used for."""
    config = run.config
    metrics = json.loads(run.file("comparison/metrics.json").read_text(encoding="utf-8"))
    split = json.loads(run.file("data/split.json").read_text(encoding="utf-8"))
    primary = metrics["primary"]
    lora = json.loads(run.file("export/adapter/adapter_config.json").read_text(encoding="utf-8"))
    merged = "- Merged model: `merged/`, complete on its own.\n" if run.file("export/merged").exists() else ""
    text = f"""# {config.model.name}, fine-tuned with LoRA on {split["source"]}

{metrics["sentence"]}

| {primary["name"]} (n = {primary["n"]}) | base | fine-tuned | difference | 95 % interval |
|---|---|---|---|---|
| | {primary["base"]:.3f} | {primary["tuned"]:.3f} | {primary["difference"]:+.3f} | {primary["ci95"][0]:+.3f} to {primary["ci95"][1]:+.3f} |

- Adapter: `adapter/` (LoRA r={lora["r"]}, alpha={lora["lora_alpha"]}), to be loaded on the base model.
{merged}- Prompt format: `{config.prompt.style}`. Training rows: {split["train_rows"]}; held-out rows: {split["eval_rows"]}, digest
  `{split["eval_sha256"][:16]}`.

For research and education. No medical advice, no diagnosis, no triage. The reasoning it learnt from is synthetic and
was not checked by clinicians.
"""
    write_text(run.file("export/README.md"), text)
    return run.file("export/README.md")


def verify_record(run: RunDir, figures: dict) -> dict:
    """What export/verify.json holds: the comparison of exports and the digest of every exported file."""
    folders = ("export/adapter", "export/merged") if run.config.export.merged else ("export/adapter",)
    return {"agreement": figures, "files": digests(record_files(run.path, folders))}
