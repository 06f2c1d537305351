"""Are the exports what was trained? Each is loaded back in a fresh process and held against the model in memory.

`python -m utils.export.verify TASK.json` is that process: nothing of the notebook that wrote the exports is in its
memory, and the tokenizer is the one in the export's own folder.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import psutil
from pydantic import BaseModel, ValidationError

from utils.data.prompts import format_prompt
from utils.errors import ModelError, RunDirError
from utils.export.adapter import weights_gib
from utils.export.base_model import find_base
from utils.export.compare_logits import (
    EXACT,
    ROUNDED,
    Continuations,
    check_tolerance,
    choose_tolerance,
    compare,
    continue_greedily,
    follow,
)
from utils.export.gguf import check_folder
from utils.export.merge import find_shards, list_tensors, read_lora, read_tensor
from utils.files import is_folder, parse_json, write_json, writing
from utils.hardware import gpus, resolve_hardware
from utils.models.load import device, load_plain, prepare_device, torch_dtype
from utils.models.memory import free_memory
from utils.models.tokenizer import guard_tokenizer, load_tokenizer, model_source
from utils.pipeline.run_dir import RunDir
from utils.pipeline.stages import BY_NAME
from utils.processes import Child
from utils.schema import Config
from utils.secrets import hide_secrets

REFERENCE = "export/reference.safetensors"
KINDS = ("adapter", "merged", "gguf")
_T4_GIB, _GGUF_PROMPTS = 14.0, 20
_WORDS = {"reference": "the model in memory", "adapter_on_16_bit": "the adapter on the 16-bit base"}


@dataclass(frozen=True)
class Model:
    """What to load: an adapter's folder with its `base` (folder or Hub id), or a folder that is complete on its own."""

    folder: str
    base: str | None = None
    revision: str | None = None
    four_bit: bool = False


@dataclass(frozen=True)
class Check:
    """A model to load back, the earlier one that it follows, and how far it may be from that (see `choose_tolerance`).

    Without a reference it decodes by itself and leads a later one.
    """

    name: str
    model: Model
    reference: str | None = None
    tolerance: str = ""


def export_prompts(run: RunDir) -> list[str]:
    """The held-out prompts that exports are compared on."""
    held_out = pd.read_parquet(run.file("data/eval.parquet")).head(run.config.export.prompts)
    return [format_prompt(question, run.config.prompt) for question in held_out["Question"]]


def write_reference(run: RunDir) -> None:
    """Continue the prompts with the trained adapter on its base, here in memory, and keep that beside the exports."""
    from peft import PeftModel

    prepare_device(run.config)
    model = load_plain(run.config, model_source(run.config))
    model = PeftModel.from_pretrained(model, str(run.file("training/adapter"))).eval()
    tokenizer = load_tokenizer(model_source(run.config), run.config.model.revision)
    reference = continue_greedily(model, tokenizer, export_prompts(run), "the model in memory")
    del model
    free_memory()
    with writing(run.file(REFERENCE)):
        reference.save(run.file(REFERENCE))


def plan_checks(run: RunDir, folders: Mapping[str, Path]) -> list[Check]:
    """What is loaded back, in order. How far it may be from its reference follows from the dtypes of both.

    A 4-bit run's merged model is held against the adapter on the 16-bit base where both fit into memory, else, loaded
    in 4-bit, against the run's own.
    """
    config, four_bit, adapter = run.config, run.config.model.load_in_4bit, str(folders["adapter"])
    now, then = resolve_hardware(config.hardware), run.record(BY_NAME["05_export"]).get("computed_on") or {}
    # Another device or backend rounds float32 otherwise.
    dtypes = {now["dtype"]} if now == then else {now["dtype"], then.get("dtype"), "float16"}
    own = Model(adapter, model_source(config), config.model.revision, four_bit)
    checks = [Check("adapter", own, "reference", choose_tolerance(dtypes))]
    if "merged" not in folders:
        return checks
    merged, leader = Model(str(folders["merged"])), "reference"
    dtypes |= {dtype for _, dtype, _ in list_tensors(find_shards(folders["merged"])).values()}
    if four_bit and _fits(run, folders["merged"]):
        leader = "adapter_on_16_bit"
        checks.append(Check(leader, Model(adapter, str(find_base(config)[0]))))
    elif four_bit:
        merged, dtypes = Model(merged.folder, four_bit=True), dtypes | {"4-bit"}
    return [*checks, Check("merged", merged, leader, choose_tolerance(dtypes))]


def verify_exports(run: RunDir, folders: Mapping[str, Path]) -> dict[str, dict]:
    """Load the exports back and compare; returns figures by check.

    Raises ModelError where an export misses its tolerance, or merged weights are not base plus adapter.
    """
    checks, prompts, figures = plan_checks(run, folders), export_prompts(run), {}
    answers = answer_elsewhere(run.config, checks, prompts, run.file(REFERENCE))
    for check in checks:
        if check.reference is None:
            continue
        found = compare(answers[check.reference], answers[check.name])
        level = "exact" if check.tolerance == "exact" else f"rounded to {check.tolerance}"
        figures[check.name] = {"against": _WORDS[check.reference], "level": level, **found}
        if problem := check_tolerance(found, check.tolerance):
            raise ModelError(
                f"The exported {check.name}, loaded back, gives {problem}; delete export/ and run 05 again."
            )
    if "merged" in folders:
        figures["merged_weights"] = check_merged_weights(folders, find_base(run.config)[0])
    if "gguf" in folders:
        leader, judged = checks[-1].reference, checks[-1].tolerance != "4-bit"
        tokenizer = load_tokenizer(folders["adapter"])
        found = check_folder(folders["gguf"], tokenizer, prompts[:_GGUF_PROMPTS], answers[leader], judged)
        figures |= {name: {"against": _WORDS[leader], **values} for name, values in found.items()}
    return figures


def answer_elsewhere(
    config: Config, checks: Sequence[Check], prompts: Sequence[str], reference: Path
) -> dict[str, Continuations]:
    """Let each model answer the prompts in one fresh process; returns {name: continuations}, the reference's included.

    Raises ModelError with the process's last line where one cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as scratch:
        task = Path(scratch) / "task.json"
        shutil.copy(reference, task.with_name("reference.safetensors"))
        wanted = {"checks": [asdict(check) for check in checks], "prompts": list(prompts)}
        write_json(task, {"config": config.model_dump(mode="json"), **wanted})
        command = [sys.executable, "-m", "utils.export.verify", task]
        with Child(command, task.with_name("log"), {"PYTHONUNBUFFERED": "1"}) as child:
            if child.wait():
                raise ModelError(
                    f"An export could not be loaded in a fresh process ({child.last_words()}); run 05 again."
                )
        names = ["reference", *(check.name for check in checks)]
        return {name: Continuations.load(task.with_name(f"{name}.safetensors")) for name in names}


def answer(task: Path) -> None:
    """What the fresh process does."""
    wanted = json.loads(task.read_text(encoding="utf-8"))
    config = Config.model_validate(wanted["config"])
    prepare_device(config)
    for check in wanted["checks"]:
        model, tokenizer = load_export(config, Model(**check["model"]))
        asked, description = (model, tokenizer, wanted["prompts"]), f"loaded back: {check['name']}"
        if check["reference"]:
            leader = Continuations.load(task.with_name(f"{check['reference']}.safetensors"))
            answers = follow(*asked, leader, description)
        else:
            answers = continue_greedily(*asked, description)
        answers.save(task.with_name(f"{check['name']}.safetensors"))
        del model, asked
        free_memory()


def load_export(config: Config, wanted: Model):
    """(model, tokenizer) of an export, as a stranger loads it."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    section = config.model.model_copy(update={"revision": wanted.revision, "load_in_4bit": wanted.four_bit})
    model = load_plain(config.model_copy(update={"model": section}), wanted.base or wanted.folder)
    tokenizer = AutoTokenizer.from_pretrained(wanted.folder, trust_remote_code=False)
    guard_tokenizer(tokenizer, wanted.folder)
    return (PeftModel.from_pretrained(model, wanted.folder) if wanted.base else model).eval(), tokenizer


def check_merged_weights(folders: Mapping[str, Path], base: Path, modules: int = 12) -> dict[str, float | int]:
    """Compare merged weights with base + scale * B @ A, computed here in float64, over evenly chosen modules.

    Returns how many were compared and the largest difference in units of the stored dtype's rounding; r products are
    added for each entry, so ModelError is raised where any differs by more than r units.
    """
    import torch

    lora = read_lora(folders["adapter"])
    names = sorted(lora.factors)[:: max(1, len(lora.factors) // modules)]
    places = [list_tensors(find_shards(folder)) for folder in (base, folders["merged"])]
    worst, rank = 0.0, len(next(iter(lora.factors.values()))[0])
    for name in names:
        before, after = (read_tensor(found[name][0], name) for found in places)
        a, b = (factor.double() for factor in lora.factors[name])
        difference = (after.double() - before.double()).addmm_(b, a, alpha=-lora.scale).abs_()
        # What rounding may do depends on the terms that were added, not on their sum, which can cancel.
        terms = before.double().abs_().addmm_(b.abs(), a.abs(), alpha=abs(lora.scale))
        units = difference.div_(terms.mul_(torch.finfo(after.dtype).eps).clamp_(min=1e-12)).max()
        worst = max(worst, float(units.nan_to_num(nan=math.inf)))  # max() of Python would pass over NaN
    if worst > rank:
        raise ModelError(
            f"The merged weights differ from base plus adapter by {worst:.1f} units of rounding, at most {rank} are "
            "rounding; run 05 again."
        )
    return {"modules": len(names), "largest_rounding_units": round(worst, 3)}


def _fits(run: RunDir, merged: Path) -> bool:
    """Whether a model of this size can be loaded in 16 bit, or 32 where the run computes so, on the run's device."""
    needed = weights_gib(merged) * torch_dtype(run.config).itemsize / 2 * 1.1 + 1.5
    if device(run.config) == "cpu":
        return psutil.virtual_memory().available / 2**30 > needed
    return (_T4_GIB if run.config.hardware.emulate_t4 else gpus()[0].memory_gib) > needed


class _Record(BaseModel):
    folders: dict[str, str]


def read_record(run: RunDir) -> dict:
    """export/verify.json; empty before the first export. Raises RunDirError where it cannot be read."""
    path = run.file("export/verify.json")
    try:
        if not path.exists():
            return {}
        record = parse_json(path.read_text(encoding="utf-8"))
        _Record.model_validate(record)
        return record
    except (OSError, ValueError) as error:
        reason = "its values are not those of verify.json" if isinstance(error, ValidationError) else error
        raise RunDirError(f"{path} cannot be read ({reason}); run 05 again.") from None


def write_record(run: RunDir, folders: Mapping[str, Path], figures: dict[str, dict]) -> None:
    """export/verify.json: where the exports are, what was compared, and the tolerances."""
    places = {
        kind: str(folder.relative_to(run.path) if folder.is_relative_to(run.path) else folder)
        for kind, folder in folders.items()
    }
    record = {"folders": places, "tolerances": {"exact": EXACT, **ROUNDED}, "agreement": figures}
    with writing(run.file("export/verify.json")):
        write_json(run.file("export/verify.json"), record)


def export_folders(run: RunDir) -> dict[str, Path]:
    """{adapter, merged, gguf: folder} of the exports that are there, in the run directory or where 05 had to put them."""
    recorded = read_record(run).get("folders", {})
    places = {kind: run.path / recorded.get(kind, f"export/{kind}") for kind in KINDS}
    return {kind: folder for kind, folder in places.items() if is_folder(folder)}


if __name__ == "__main__":
    hide_secrets()
    answer(Path(sys.argv[1]))
