"""The model card: what the run's own files say, and nothing that `comparison/metrics.json` does not carry.

The words are in the template; here is what it is filled with, and the Hub's metadata.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from utils.data.prompts import find_format, format_prompt
from utils.evaluation.statistics import show_p
from utils.export.base_model import merged_into, trained_on
from utils.export.compare_logits import LEVELS
from utils.export.gguf import LORA, file_name
from utils.files import write_text, writing
from utils.pipeline.run_dir import RunDir
from utils.project import NAME, REPOSITORY
from utils.schema import EMBEDDED, GgufType

HOLDS = {
    "adapter": "a LoRA adapter, to be loaded on its base model",
    "merged": "the whole model, the adapter folded into its weights",
    "gguf": "the merged model for llama.cpp and what rests on it",
}
_LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp"}
_RELATIONS = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
_DATA = "FreedomIntelligence/medical-o1-reasoning-SFT"
_LLAMA = "https://www.llama.com/llama3_1/license/"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for --max-lora-rank
_GGUF_FILES = [file_name(gguf_type) for gguf_type in reversed(get_args(GgufType))]  # the smallest first
_QUESTION = "Which vitamin does the skin make in sunlight?"


def write_cards(run: RunDir, folders: Mapping[str, Path], figures: Mapping[str, dict]) -> None:
    """README.md in every exported folder, each a repository's card, and export/README.md, which names them."""
    for kind, folder in folders.items():
        with writing(folder / "README.md"):
            write_text(folder / "README.md", str(make_card(run, kind, folders, figures)))
    lines = [f"# {_title(run)}", "", _read(run, "comparison/metrics.json")["sentence"], ""]
    lines += [f"- `{kind}/`: {HOLDS[kind]}; a repository of its own, with its card" for kind in folders]
    lines += ["", "For research and education only. No medical advice."]
    with writing(run.file("export/README.md")):
        write_text(run.file("export/README.md"), "\n".join(lines) + "\n")


def make_card(run: RunDir, kind: str, folders: Mapping[str, Path], figures: Mapping[str, dict]) -> ModelCard:
    """The card of one exported folder: `adapter`, `merged` or `gguf`."""
    config, stages = run.config, run.manifest()["stages"]
    metrics, split = _read(run, "comparison/metrics.json"), _read(run, "data/split.json")
    trained, known_data = stages["03_lora_training"], config.data.path is None and config.data.name == _DATA
    checks = {name: found for name, found in figures.items() if "identical" in found}
    own_checks = [found for name, found in checks.items() if name == kind or name.startswith(f"{kind}_")]
    prompt = format_prompt("QUESTION", config.prompt)
    return ModelCard.from_template(
        _metadata(run, kind, metrics, split, known_data),
        template_str=(files("utils.report") / "templates" / "card.md.j2").read_text(encoding="utf-8"),
        title=_title(run),
        kind=kind,
        holds=HOLDS[kind],
        config=config,
        metrics=metrics,
        split=split,
        trained=trained,
        machine=_read(run, "environment.json")["machine"],
        seconds=sum(stage.get("seconds", 0) for stage in stages.values()),
        base=merged_into(config),
        trained_on=trained_on(config),
        stored_in="4-bit NF4" if config.model.load_in_4bit else trained["computed_on"]["dtype"],
        embedded=merged_into(config)[0] == EMBEDDED,
        known_base=_known_base(run),
        known_data=known_data,
        prompt=prompt.removesuffix("\n"),
        ends_in_newline=prompt.endswith("\n"),
        eos=find_format(config.prompt).end,
        question=_QUESTION,
        escaped_prompt=shlex.quote(format_prompt(_QUESTION, config.prompt).replace("\n", "\\n")),
        max_rank=next((rank for rank in _RANKS if rank >= config.lora.r), _RANKS[-1]),
        files=_list_files(folders[kind]) if kind == "gguf" else [],
        smallest=next((name for name in _GGUF_FILES if kind == "gguf" and (folders[kind] / name).exists()), ""),
        show_p=show_p,
        own_check=own_checks[0] if own_checks else None,
        checks=checks,
        levels=LEVELS,
        figures=figures,
        lora=LORA,
        has_lora=(folders[kind] / LORA).exists(),
        project=NAME,
        address=f"https://github.com/{REPOSITORY}",
        llama=_LLAMA,
    )


def _metadata(run: RunDir, kind: str, metrics: dict, split: dict, known_data: bool) -> ModelCardData:
    config, (base, _) = run.config, merged_into(run.config)
    licence = {"license": "other", "license_name": "as-the-base-model"}
    if _known_base(run):
        licence = {"license": "other", "license_name": "mit-and-llama-3.1-community", "license_link": _LLAMA}
    elif config.model.name == EMBEDDED:
        licence = {"license": "apache-2.0"}
    # The Hub takes what stands here for the figures of the files beside it; only the adapter was measured.
    measured = {"model_name": _title(run), "eval_results": _eval_results(run, metrics, split)}
    return ModelCardData(
        language="en",
        library_name=_LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=["lora", "medical", "reasoning", "research-only", *(["synthetic-data"] if config.embedded_data else [])],
        base_model=base if "/" in base else None,
        base_model_relation=_RELATIONS[kind] if "/" in base else None,
        datasets=[config.data.name] if config.data.path is None and "/" in config.data.name else None,
        **licence,
        **(measured if kind == "adapter" else {}),
    )


def _eval_results(run: RunDir, metrics: dict, split: dict) -> list[EvalResult]:
    """The fine-tuned model's figures in the Hub's form, with n, the base's figure and the interval as arguments.

    Only what was asked of one data set has a place there; form and length are in the card's table.
    """
    config, results = run.config, []
    rows = {
        "dataset_type": config.data.name if config.data.path is None else "local",
        "dataset_name": f"{split['source']}, held-out rows",
        "dataset_revision": split["revision"],
    }
    for result in (metrics["primary"], *metrics["secondary"]):
        name, _, benchmark = result["name"].partition(":")
        if name.startswith(("multiple_choice", "letter")):
            metric, data = "accuracy", _benchmark(run, benchmark)
        elif name == "accuracy" or name.startswith("rouge"):
            metric, data = name.partition("_")[0], rows
        elif result["unit"] == "nats per token":
            metric, data = "loss", rows
        else:
            continue
        kept = ("n", "groups", "base", "difference", "ci95", "p_value", "p_holm")
        arguments = {"metric": result["name"], "primary": result is metrics["primary"]}
        results.append(
            EvalResult(
                task_type="text-generation",
                metric_type=metric,
                metric_name=result["label"],
                metric_value=result["tuned"],
                metric_args=arguments | {key: result[key] for key in kept},
                **data,
            )
        )
    return results


def _benchmark(run: RunDir, name: str) -> dict[str, str | None]:
    """The Hub's description of a benchmark: the registered one without a name, else the further one that is called so."""
    first, *more = run.config.evaluate.benchmarks
    for section in more if name else [first]:
        known_as = str(section.name or section.path.name)
        if _fold(name) in _fold(known_as):
            return {
                "dataset_type": section.name or "local",
                "dataset_name": known_as,
                "dataset_config": section.subset,
                "dataset_split": section.split if section.path is None else None,
                "dataset_revision": section.revision,
            }
    return {"dataset_type": "local", "dataset_name": name}


def _fold(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _list_files(folder: Path) -> list[tuple[str, str]]:
    """(file, what it is) of export/gguf."""
    listed = [("Modelfile", "for `ollama create`")]
    for path in sorted(folder.glob("*.gguf")):
        what = "the LoRA alone, for `--lora`" if path.name == LORA else "the whole model"
        listed.append((path.name, f"{what}, {path.stat().st_size / 2**20:,.1f} MiB"))
    return listed


def _known_base(run: RunDir) -> bool:
    return "deepseek-r1-distill-llama" in run.config.model.name.lower()


def _title(run: RunDir) -> str:
    name, _ = trained_on(run.config)
    what = "The demo's tiny model" if name == EMBEDDED else name.split("/")[-1]
    return f"{what}, fine-tuned with LoRA on {_read(run, 'data/split.json')['source']}"


def _read(run: RunDir, relative: str) -> dict[str, Any]:
    return json.loads(run.file(relative).read_text(encoding="utf-8"))
