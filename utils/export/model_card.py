"""The model card: what the run's own files say, and nothing that `comparison/metrics.json` does not carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from utils.data.prompts import EOS, format_prompt
from utils.evaluation.statistics import show_p
from utils.export.base_model import Base
from utils.export.card_facts import (
    LLAMA,
    bibliography,
    eval_results,
    known_base,
    licences,
    limits,
    not_measured,
    read,
    recipe,
    title,
)
from utils.export.chat_template import Served, llama_cpp_lines, ollama_lines, transformers_lines, vllm_lines
from utils.export.compare_logits import LEVELS
from utils.export.gguf import LORA, file_name
from utils.files import write_text, writing
from utils.pipeline.run_dir import RunDir
from utils.project import NAME, REPOSITORY
from utils.schema import EMBEDDED

_HOLDS = {
    "adapter": "a LoRA adapter, to be loaded on its base model",
    "merged": "the whole model, the adapter folded into its weights",
    "gguf": "the merged model for llama.cpp and what rests on it",
}
_LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp"}


def write_cards(run: RunDir, base: Base, folders: Mapping[str, Path], figures: Mapping[str, dict]) -> None:
    """README.md in every exported folder, each a repository's card, and export/README.md, which names them."""
    for kind, folder in folders.items():
        _write(folder / "README.md", str(make_card(run, base, kind, folders, figures)))
    lines = [f"# {title(run)}", "", read(run, "comparison/metrics.json")["sentence"], ""]
    lines += [f"- `{kind}/`: {_HOLDS[kind]}; a repository of its own, with its card" for kind in folders]
    lines += ["", "For research and education only. No medical advice."]
    _write(run.file("export/README.md"), "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    with writing(path):
        write_text(path, text)


def make_card(
    run: RunDir, base: Base, kind: str, folders: Mapping[str, Path], figures: Mapping[str, dict]
) -> ModelCard:
    """The card of one exported folder: `adapter`, `merged` or `gguf`."""
    config, metrics = run.config, read(run, "comparison/metrics.json")
    split = read(run, "data/split.json")
    decoding = metrics["registration"]["decoding"]
    served = _served(run, base, folders)
    return ModelCard.from_template(
        _metadata(run, base, kind, metrics, split),
        template_str=(files("utils.report") / "templates" / "card.md.j2").read_text(encoding="utf-8"),
        title=title(run),
        metrics=metrics,
        split=split,
        holds=_HOLDS[kind],
        files=_gguf_list(folders[kind], figures) if kind == "gguf" else [],
        prompt=format_prompt("QUESTION", config.prompt.style).removesuffix("\n"),
        ends_in_newline=format_prompt("QUESTION", config.prompt.style).endswith("\n"),
        eos=EOS,
        decoding=f"temperature {decoding['temperature']} and top-p {decoding['top_p']}"
        if decoding["do_sample"]
        else "greedy decoding",
        serving=_serving(served, kind, folders),
        rows=[_row(metrics["primary"], True), *(_row(result, False) for result in metrics["secondary"])],
        not_measured=not_measured(run, kind, figures),
        contamination=_contamination(metrics["contamination"]),
        recipe=recipe(run, base, split),
        checks=_checks(figures),
        levels=LEVELS,
        not_loaded=_not_loaded(folders, figures),
        limits=limits(run),
        licences=licences(run),
        project=NAME,
        address=f"https://github.com/{REPOSITORY}",
        bibliography=bibliography(run),
    )


def _metadata(run: RunDir, base: Base, kind: str, metrics: dict, split: dict) -> ModelCardData:
    config = run.config
    on_hub = "/" in base.name
    relation = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}[kind]
    licence = (
        {"license": "other", "license_name": "mit-and-llama-3.1-community", "license_link": LLAMA}
        if known_base(run)
        else {"license": "apache-2.0"}
        if config.model.name == EMBEDDED
        else {"license": "other", "license_name": "as-the-base-model"}
    )
    measured = kind == "adapter"  # the Hub takes what stands here for the figures of the files beside it
    return ModelCardData(
        model_name=title(run) if measured else None,
        language="en",
        library_name=_LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=["lora", "medical", "reasoning", "research-only", *(["synthetic-data"] if config.embedded_data else [])],
        base_model=base.name if on_hub else None,
        base_model_relation=relation if on_hub else None,
        datasets=[config.data.name] if config.data.path is None and "/" in config.data.name else None,
        eval_results=eval_results(run, metrics, split) if measured else None,
        **licence,
    )


def _row(result: dict, primary: bool) -> dict[str, str]:
    digits = {"share": 3, "tokens": 1}.get(result["unit"], 3)
    low, high = result["ci95"]
    p = result["p_value"] if primary else result["p_holm"]
    unit = "" if result["unit"] in ("share", "score") else f", {result['unit']}"
    return {
        "label": result["label"] + unit,
        "n": str(result["n"]) + (f" in {result['groups']} groups" if result["groups"] < result["n"] else ""),
        "base": f"{result['base']:.{digits}f}",
        "tuned": f"{result['tuned']:.{digits}f}",
        "difference": f"{result['difference']:+.{digits}f}",
        "interval": f"{low:+.{digits}f} to {high:+.{digits}f}",
        "p": show_p(p),
    }


def _contamination(found: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items() if value is not None)


def _checks(figures: Mapping[str, dict]) -> list[dict[str, Any]]:
    return [
        {
            "name": name.replace("_", " "),
            "against": found["against"],
            "level": found["level"],
            "prompts": found["prompts"],
            "identical": found["identical"],
            "difference": f"{found['largest_logit_difference']:.1e}"
            if "largest_logit_difference" in found
            else "not asked",
        }
        for name, found in figures.items()
        if "identical" in found
    ]


def _not_loaded(folders: Mapping[str, Path], figures: Mapping[str, dict]) -> list[tuple[str, str]]:
    """(file, why) of the GGUF files that no program has opened."""
    if "gguf" not in folders:
        return []
    refused = [
        (file_name(name.removeprefix("gguf_")), found["loaded"].removeprefix("no: "))
        for name, found in figures.items()
        if "loaded" in found
    ]
    return [*refused, *([(LORA, "no check opens it")] if (folders["gguf"] / LORA).exists() else [])]


def _served(run: RunDir, base: Base, folders: Mapping[str, Path]) -> Served:
    names = sorted(path.name for path in folders["gguf"].glob("model-*.gguf")) if "gguf" in folders else []
    order = [name for kind in ("f16", "q8_0", "q4_k_m") for name in names if kind in name]
    return Served(
        base_id=base.name,
        base_revision=base.revision,
        rank=run.config.lora.r,
        style=run.config.prompt.style,
        generate=run.config.generate,
        embedded=base.name == EMBEDDED,
        gguf=tuple(order),
    )


def _serving(served: Served, kind: str, folders: Mapping[str, Path]) -> list[tuple[str, str, str]]:
    """(heading, language, lines) of every way to run the folder."""
    if kind == "gguf":
        return [("llama.cpp", "sh", llama_cpp_lines(served)), ("Ollama", "sh", ollama_lines())]
    ways = [("transformers", "python", transformers_lines(served, kind))]
    if not (served.embedded and kind == "adapter"):
        ways.append(("vLLM", "sh", vllm_lines(served, kind)))
    return ways


def _gguf_list(folder: Path, figures: Mapping[str, dict]) -> Sequence[tuple[str, str]]:
    finer = figures.get("gguf", {})
    listed = []
    for path in sorted(folder.glob("*.gguf")):
        note = f", {finer[path.name]} tensors in a finer type" if finer.get(path.name) else ""
        what = "the LoRA alone, for `--lora`" if path.name == LORA else f"the whole model{note}"
        listed.append((path.name, f"{what}, {path.stat().st_size / 2**20:,.1f} MiB"))
    return [*listed, ("Modelfile", "for `ollama create`")]
