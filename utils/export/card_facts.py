"""What a card says of a run, read from the run's own files: recipe, results, limits, licences, whom to cite."""

from __future__ import annotations

import json
from collections.abc import Mapping

from huggingface_hub import EvalResult

from utils.export.base_model import Base, trained_on
from utils.pipeline.run_dir import RunDir
from utils.schema import EMBEDDED, BenchmarkSection

_DATA = "FreedomIntelligence/medical-o1-reasoning-SFT"
LLAMA = "https://www.llama.com/llama3_1/license/"
# The Hub's name for each metric, of held-out rows and of benchmark items.
_OF_ROWS = {"accuracy": "accuracy", "nll": "loss", "nll_reasoning": "loss", "nll_response": "loss", "rouge_l": "rouge"}
_OF_ITEMS = {"multiple_choice": "accuracy", "multiple_choice_forced": "accuracy", "letter_logprobs": "accuracy"}
_MEMORY = {"rss_gib": "main memory", "gpu_reserved_gib": "GPU memory"}
_DEEPSEEK = """\
@misc{deepseekai2025deepseekr1,
  title = {DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning},
  author = {DeepSeek-AI}, year = {2025}, eprint = {2501.12948}, archivePrefix = {arXiv}
}
"""
_HUATUO = """\
@misc{chen2024huatuogpto1,
  title = {HuatuoGPT-o1, Towards Medical Complex Reasoning with LLMs},
  author = {Chen, Junying and others}, year = {2024}, eprint = {2412.18925}, archivePrefix = {arXiv}
}
"""
_LORA = """\
@misc{hu2021lora,
  title = {LoRA: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and others}, year = {2021}, eprint = {2106.09685}, archivePrefix = {arXiv}
}
"""


def eval_results(run: RunDir, metrics: dict, split: dict) -> list[EvalResult]:
    """The fine-tuned model's figures in the Hub's form, with n, the base's figure and the interval as arguments.

    Only what was asked of one data set has a place there; form and length are in the card's table.
    """
    config, results = run.config, []
    own = {
        "dataset_type": config.data.name if config.data.path is None else "local",
        "dataset_name": f"{split['source']}, held-out rows",
        "dataset_revision": split["revision"],
    }
    measured = [metrics["primary"], *metrics["secondary"]]
    found = dict.fromkeys(result["name"].partition(":")[2] for result in measured if ":" in result["name"])
    names = metrics.get("benchmarks") or ["", *found]  # without: written before they were kept
    for result in measured:
        name, _, benchmark = result["name"].partition(":")
        if name not in {*_OF_ROWS, *_OF_ITEMS}:
            continue
        section = config.evaluate.benchmarks[names.index(benchmark) if benchmark else 0] if name in _OF_ITEMS else None
        kept = ("n", "groups", "base", "difference", "ci95", "p_value", "p_holm")
        results.append(
            EvalResult(
                task_type="text-generation",
                metric_type=_OF_ITEMS.get(name) or _OF_ROWS[name],
                metric_name=result["label"],
                metric_value=result["tuned"],
                metric_args={"metric": result["name"], "primary": result is metrics["primary"]}
                | {key: result[key] for key in kept},
                **(_benchmark(section) if section else own),
            )
        )
    return results


def _benchmark(section: BenchmarkSection) -> dict:
    name = str(section.name or section.path.name)
    return {
        "dataset_type": section.name or "local",
        "dataset_name": name,
        "dataset_config": section.subset,
        "dataset_split": section.split if section.path is None else None,
        "dataset_revision": section.revision,
    }


def recipe(run: RunDir, base: Base, split: dict) -> list[tuple[str, str]]:
    config, manifest = run.config, run.manifest()["stages"]
    lora, train, trained = config.lora, config.train, manifest["03_lora_training"]
    machine = read(run, "environment.json")["machine"]
    devices = ", ".join(gpu["name"] for gpu in machine["gpus"]) or f"{machine['processors']} CPU cores"
    name, revision = trained_on(config)
    peak = ", ".join(f"{value} GiB of {_MEMORY[key]}" for key, value in trained["peak_memory"].items())
    return [
        ("base model", f"{_at(name, revision)}, trained on in {base_type(run)}"),
        ("merged into", f"{_at(base.name, base.revision)}, in its own dtype"),
        ("data", _at(split["source"], split["revision"])),
        ("rows", f"{split['train_rows']} for training, {split['eval_rows']} held out, {len(split['dropped'])} dropped"),
        ("split", f"training `{split['train_sha256'][:16]}`, held out `{split['eval_sha256'][:16]}` (sha256)"),
        ("LoRA", f"r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout}, on {', '.join(lora.target_modules)}"),
        (
            "training",
            f"{trained['figures'].get('steps', '?')} steps of {train.per_device_train_batch_size} × {train.gradient_accumulation_steps}, "
            f"{train.optim}, learning rate {train.learning_rate}, {train.lr_scheduler_type}, loss on {train.loss_on}, "
            f"seed {train.seed}",
        ),
        ("hardware", f"{devices}, {trained['computed_on']['backend']}, {trained['computed_on']['dtype']}; peak {peak}"),
        ("time", f"{trained['seconds']:.0f} s of training, {sum(s.get('seconds', 0) for s in manifest.values()):.0f} s in all"),
        ("emissions", "not measured"),
        ("versions", ", ".join(f"{package} {version}" for package, version in trained["versions"].items() if version)),
    ]  # fmt: skip


def base_type(run: RunDir) -> str:
    """What the base's weights were stored in while the run trained and measured."""
    dtype = run.manifest()["stages"]["03_lora_training"]["computed_on"]["dtype"]
    return "4-bit NF4" if run.config.model.load_in_4bit else dtype


def not_measured(run: RunDir, kind: str, figures: Mapping[str, dict]) -> str:
    """Whose figures the table of this card holds, where they are not the folder's own; empty for the adapter."""
    if kind == "adapter":
        return ""
    held = [f for name, f in figures.items() if "identical" in f and (name == kind or name.startswith(f"{kind}_"))]
    checked = (
        f"were held against {held[0]['against']} on {held[0]['prompts']} prompts, not measured again"
        if held
        else "were neither measured again nor held against it"
    )
    return f"All of this was measured with the adapter on the base in {base_type(run)}; the files here {checked}."


def limits(run: RunDir) -> list[str]:
    found = [
        "Research and education. Nobody should act on an answer without a clinician's judgement.",
        "It can state false things fluently, and its reasoning need not be how it came to its answer.",
        "No test of safety, bias or populations was made; only the questions above were asked.",
    ]
    if known_data(run):
        found.append(
            "The reasoning that it learnt from was written by GPT-4o and checked by GPT-4o, not by clinicians."
        )
        found.append(
            "The questions are English, in the style of licensing examinations: no dialogue, no records, no images."
        )
    if run.config.embedded_data:
        found.append("The data are synthetic: every condition, test and treatment in them is invented.")
    return found


def licences(run: RunDir) -> list[str]:
    config = run.config
    base, _ = trained_on(config)
    if known_base(run):
        found = [
            f"Base model: MIT (DeepSeek), on Llama 3.1, whose [community licence]({LLAMA}) applies too. Built with Llama."
        ]
    elif config.model.name == EMBEDDED:
        found = ["Base model: made by this series, Apache-2.0."]
    else:
        found = [f"Base model: the licence of {base} applies."]
    if known_data(run):
        found.append(
            f"Data: [{_DATA}](https://huggingface.co/datasets/{_DATA}), Apache-2.0; its reasoning comes from OpenAI's model."
        )
    else:
        found.append(
            "Data: made by this series, Apache-2.0."
            if config.embedded_data
            else "Data: the licence of your rows applies."
        )
    return found


def title(run: RunDir) -> str:
    name, _ = trained_on(run.config)
    what = "The demo's tiny model" if name == EMBEDDED else name.split("/")[-1]
    return f"{what}, fine-tuned with LoRA on {read(run, 'data/split.json')['source']}"


def known_base(run: RunDir) -> bool:
    return "deepseek-r1-distill-llama" in run.config.model.name.lower()


def known_data(run: RunDir) -> bool:
    return run.config.data.path is None and run.config.data.name == _DATA


def read(run: RunDir, relative: str) -> dict:
    return json.loads(run.file(relative).read_text(encoding="utf-8"))


def bibliography(run: RunDir) -> str:
    """BibTeX entries of what this run rests on."""
    return "\n".join([_LORA, *([_DEEPSEEK] if known_base(run) else []), *([_HUATUO] if known_data(run) else [])])


def _at(name: str, revision: str | None) -> str:
    return f"{name} at `{revision}`" if revision else name
