"""The model card: the words are in the template, the figures in the run's own files."""

import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from utils.data.prompts import find_format, format_prompt
from utils.evaluation.statistics import show_p
from utils.export.adapter import merged_into, trained_on
from utils.export.compare_logits import LEVELS
from utils.export.gguf import BITS, LORA, file_name
from utils.files import read_json, write_text
from utils.pipeline.run_dir import RunDir
from utils.project import NAME, REPOSITORY
from utils.schema import EMBEDDED

_KINDS = {  # {export: what its folder holds, and on the Hub its library and its relation to the base}
    "adapter": ("a LoRA adapter, to be loaded on its base model", "peft", "adapter"),
    "merged": ("the whole model, the adapter folded into its weights", "transformers", "finetune"),
    "gguf": ("the merged model for llama.cpp and what rests on it", "llama.cpp", "quantized"),
}
_DATA = "FreedomIntelligence/medical-o1-reasoning-SFT"
_LLAMA = "https://www.llama.com/llama3_1/license/"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for --max-lora-rank
_QUESTION = "Which vitamin does the skin make in sunlight?"


def write_cards(run: RunDir, folders: Mapping[str, Path], figures: Mapping[str, dict]) -> None:
    """README.md in every exported folder, each a repository's card, and export/README.md, which names them."""
    for kind, folder in folders.items():
        write_text(folder / "README.md", str(make_card(run, kind, folders, figures)))
    lines = [f"# {_title(run)}", "", read_json(run.file("comparison/metrics.json"))["sentence"], ""]
    for kind, folder in folders.items():
        lost = "" if folder.is_relative_to(run.path) else "; too large to be kept here, made to be uploaded"
        lines.append(f"- `{kind}/`: {_KINDS[kind][0]}; a repository of its own, with its card{lost}")
    lines += ["", "For research and education only. No medical advice."]
    write_text(run.file("export/README.md"), "\n".join(lines) + "\n")


def make_card(run: RunDir, kind: str, folders: Mapping[str, Path], figures: Mapping[str, dict]) -> ModelCard:
    """The card of one exported folder: `adapter`, `merged` or `gguf`."""
    config, stages = run.config, run.manifest()["stages"]
    trained, base = stages["03_lora_training"], merged_into(config)
    sizes = {path.name: path.stat().st_size for path in folders[kind].glob("*.gguf")} if kind == "gguf" else {}
    checks = {name: found for name, found in figures.items() if "identical" in found}
    return ModelCard.from_template(
        _metadata(run, kind),
        template_str=(files("utils.report") / "templates" / "card.md.j2").read_text(encoding="utf-8"),
        title=_title(run),
        kind=kind,
        holds=_KINDS[kind][0],
        config=config,
        metrics=read_json(run.file("comparison/metrics.json")),
        split=read_json(run.file("data/split.json")),
        trained=trained,
        adapter=(adapter := read_json(run.file("export/adapter/adapter_config.json"))),
        machine=read_json(run.file("environment.json"))["machine"],
        seconds=sum(stage.get("seconds", 0) for stage in stages.values()),
        base=base,
        trained_on=trained_on(config),
        stored_in="4-bit NF4" if config.model.load_in_4bit else trained["computed_on"]["dtype"],
        embedded=base[0] == EMBEDDED,
        known_base=_known_base(run),
        known_data=config.data.path is None and config.data.name == _DATA,
        prompt=format_prompt("QUESTION", config.prompt),
        eos=find_format(config.prompt).end,
        question=_QUESTION,
        escaped_prompt=shlex.quote(format_prompt(_QUESTION, config.prompt).replace("\n", "\\n")),
        max_rank=next((rank for rank in _RANKS if rank >= adapter["r"]), _RANKS[-1]),
        sizes=sizes,
        smallest=next((name for name in map(file_name, BITS) if name in sizes), ""),
        show_p=show_p,
        own_check=next((found for name, found in checks.items() if name.startswith(kind)), None),
        checks=checks,
        levels=LEVELS,
        figures=figures,
        lora=LORA,
        project=NAME,
        address=f"https://github.com/{REPOSITORY}",
        llama=_LLAMA,
    )


def _metadata(run: RunDir, kind: str) -> ModelCardData:
    config, (base, _), (_, library, relation) = run.config, merged_into(run.config), _KINDS[kind]
    about = {"license": "other", "license_name": "as-the-base-model"}
    if _known_base(run):
        about = {"license": "other", "license_name": "mit-and-llama-3.1-community", "license_link": _LLAMA}
    elif config.model.name == EMBEDDED:
        about = {"license": "apache-2.0"}
    if "/" in base:
        about |= {"base_model": base, "base_model_relation": relation}
    if config.data.path is None and "/" in config.data.name:
        about["datasets"] = [config.data.name]
    tags = ["lora", "medical", "reasoning", "research-only", *(["synthetic-data"] if config.embedded_data else [])]
    return ModelCardData(language="en", library_name=library, pipeline_tag="text-generation", tags=tags, **about)


def _known_base(run: RunDir) -> bool:
    return "deepseek-r1-distill-llama" in run.config.model.name.lower()


def _title(run: RunDir) -> str:
    name, _ = trained_on(run.config)
    what = "The demo's tiny model" if name == EMBEDDED else name.split("/")[-1]
    return f"{what}, fine-tuned with LoRA on {read_json(run.file('data/split.json'))['source']}"
