"""Are the exports what was trained? Every one is loaded back in a fresh process and held against the model in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import psutil
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from utils.data.prompts import format_prompt
from utils.errors import ModelError, RunDirError
from utils.export.base_model import Base, find_base
from utils.export.compare_logits import (
    BFLOAT16,
    EXACT,
    FOUR_BIT,
    HALF,
    Continuations,
    Level,
    compare,
    continue_greedily,
    judge,
)
from utils.export.gguf import check_folder
from utils.export.llama_cpp import find_llama_cpp
from utils.export.loadback import answer_elsewhere
from utils.export.merge import Lora, read_lora
from utils.export.shards import find_shards
from utils.files import (
    digests,
    is_folder,
    is_there,
    parse_json,
    record_files,
    relative_name,
    sha256,
    write_json,
    writing,
)
from utils.hardware import GIB, gpus, resolve_hardware
from utils.models.load import device, load_plain, torch_dtype
from utils.models.memory import free_memory
from utils.models.tokenizer import load_tokenizer, model_source
from utils.pipeline.run_dir import RunDir
from utils.pipeline.stages import BY_NAME
from utils.pipeline.state import read_state

REFERENCE = "export/reference.safetensors"
_LEADERS = {"reference": "the model in memory", "adapter_on_16_bit": "the adapter on the 16-bit base"}
KINDS = ("adapter", "merged", "gguf")
_T4_GIB, _GGUF_PROMPTS, _ROWS = 14.0, 20, 512


def _exported(name: str) -> str:
    path = relative_name(name)
    if path is None or len(path.parts) < 2 or path.parts[0] != "export":
        raise ValueError(f"{name!r} is no file below export/")
    return name


def _place_name(folder: str) -> str:
    if "\0" in folder:
        raise ValueError("a null byte")
    return folder


class _Record(BaseModel):
    folders: dict[Literal[KINDS], Annotated[str, Field(min_length=1, max_length=4000), AfterValidator(_place_name)]]
    files: dict[Annotated[str, AfterValidator(_exported)], str]


def export_prompts(run: RunDir) -> list[str]:
    """The held-out prompts that exports are compared on."""
    held_out = pd.read_parquet(run.file("data/eval.parquet")).head(run.config.export.prompts)
    return [format_prompt(question, run.config.prompt.style) for question in held_out["Question"]]


def export_folders(run: RunDir) -> dict[str, Path]:
    """{adapter, merged, gguf: folder} of the exports that are there, in the run directory or where 05 had to put them."""
    recorded = read_record(run).get("folders", {})
    places = {kind: run.path / recorded.get(kind, f"export/{kind}") for kind in KINDS}
    return {kind: folder for kind, folder in places.items() if is_folder(folder)}


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


def write_reference(run: RunDir) -> Continuations:
    """Continue the prompts with the trained adapter on its base, here in memory, and keep that beside the exports."""
    from peft import PeftModel

    model = load_plain(run.config, model_source(run.config))
    model = PeftModel.from_pretrained(model, str(run.file("training/adapter"))).eval()
    tokenizer = load_tokenizer(model_source(run.config), run.config.model.revision)
    reference = continue_greedily(model, tokenizer, export_prompts(run), "the model in memory")
    del model
    free_memory()
    with writing(run.file(REFERENCE)):
        reference.save(run.file(REFERENCE))
    return reference


def verify_exports(run: RunDir, folders: Mapping[str, Path]) -> dict[str, dict]:
    """Load adapter and merged model back and compare; returns figures by check.

    Where weights or sums are rounded to 16 bits or fewer, the merged model is held against the adapter on the 16-bit
    base if both fit into memory, else against the run's 4-bit model, with a wider tolerance (see `agreement`).
    Raises ModelError where an export misses its tolerance, or merged weights are not base plus adapter.
    """
    config, reference = run.config, Continuations.load(run.file(REFERENCE))
    four_bit, revision = config.model.load_in_4bit, config.model.revision
    exact = not four_bit and torch_dtype(config).itemsize == 4 and _same_machine(run)
    tasks = {"adapter": _task(folders["adapter"], model_source(config), revision, four_bit)}
    half: Level = "bfloat16" if str(torch_dtype(config)) == "torch.bfloat16" else "half"
    level = "exact" if exact else half
    against: dict[str, tuple[str, Level]] = {"adapter": ("reference", level)}
    if "merged" in folders:
        base = find_base(config)
        if not four_bit:
            against["merged"] = ("reference", level)
        elif _fits(run, folders["merged"]):
            tasks["adapter_on_16_bit"] = _task(folders["adapter"], str(base.folder), None, False, follows=None)
            against["merged"] = ("adapter_on_16_bit", half)
        else:
            against["merged"] = ("reference", "four bit")
        leader, judged = against["merged"]
        tasks["merged"] = _task(folders["merged"], None, None, judged == "four bit", leader)
    prompts = export_prompts(run)
    answers = {"reference": reference} | answer_elsewhere(config, tasks, prompts, run.file(REFERENCE))
    figures: dict[str, dict] = {}
    for name, (leader, level) in against.items():
        figures[name] = {"against": _LEADERS[leader], "level": level, **compare(answers[leader], answers[name])}
        problem = judge(figures[name], level)
        if problem:
            raise ModelError(f"The exported {name}, loaded back, gives {problem}; delete export/ and run 05 again.")
    if "merged" in folders:
        figures["merged_weights"] = check_merged_weights(folders, base)
    if "gguf" in folders and "merged" in against:  # whose tokens it is held against
        held_out = pd.read_parquet(run.file("data/eval.parquet")).head(min(config.export.prompts, _GGUF_PROMPTS))
        figures |= check_folder(
            find_llama_cpp(),
            folders["gguf"],
            load_tokenizer(folders["adapter"]),
            list(held_out["Question"]),
            config.prompt.style,
            answers[against["merged"][0]],
            judged=against["merged"][1] != "four bit",
            against=_LEADERS[against["merged"][0]],
        )
    return figures


def _task(
    folder: Path, base: str | None, revision: str | None, four_bit: bool, follows: str | None = "reference"
) -> dict:
    return {"folder": str(folder), "base": base, "revision": revision, "four_bit": four_bit, "follows": follows}


def check_merged_weights(folders: Mapping[str, Path], base: Base, modules: int = 12) -> dict[str, float | int]:
    """Compare merged weights with base + scale * B @ A, computed here in float64, over evenly chosen modules.

    Returns how many were compared and the largest difference in units of the stored dtype's rounding. Raises
    ModelError where any differs by more than r units.
    """
    from safetensors import safe_open

    lora = read_lora(folders["adapter"])
    names = sorted(lora.factors)[:: max(1, len(lora.factors) // modules)]
    shards = {folder: find_shards(folder) for folder in (base.folder, folders["merged"])}
    files = {
        (folder, tensor.name): shard.path
        for folder, parts in shards.items()
        for shard in parts
        for tensor in shard.tensors
    }
    worst, rank = 0.0, 0
    for name in names:
        pair = []
        for folder in shards:
            with safe_open(files[folder, name], framework="pt") as tensors:
                pair.append(tensors.get_tensor(name).clone())
        rank = lora.factors[name][0].shape[0]
        for rows in range(0, len(pair[0]), _ROWS):  # float64 is large
            worst = max(worst, _rounding_units(*(t[rows : rows + _ROWS] for t in pair), lora, name, rows))
    if not worst <= rank:  # r products are added for each entry
        raise ModelError(
            f"The merged weights differ from base plus adapter by {worst:.1f} units of rounding, at most {rank} are "
            "rounding; run 05 again."
        )
    return {"modules": len(names), "largest_rounding_units": round(worst, 3)}


def _rounding_units(before, after, lora: Lora, name: str, first: int) -> float:
    """The largest difference of merged rows from before + scale * B @ A, in units of what rounding may do.

    That depends on the terms that were added, not on their sum, which can cancel.
    """
    import torch

    a, b = (factor.double() for factor in lora.factors[name])
    b, before = b[first : first + len(before)], before.double()
    expected = before + lora.scale * (b @ a)
    unit = torch.finfo(after.dtype).eps * (before.abs() + abs(lora.scale) * (b.abs() @ a.abs()))
    units = (after.double() - expected).abs() / unit.clamp(min=1e-12)
    return float(units.nan_to_num(nan=math.inf).max())  # max() of Python would pass over NaN


def write_record(run: RunDir, folders: Mapping[str, Path], figures: dict[str, dict]) -> Path:
    """export/verify.json: where the exports are, what was compared, the tolerances, and the digest of every file."""
    files = digests(record_files(run.path, (REFERENCE, "export/README.md")))
    for kind, folder in folders.items():
        files |= {f"export/{name}": value for name, value in digests(record_files(folder.parent, (kind,))).items()}
    record = {
        "folders": {kind: str(place(run, folder)) for kind, folder in folders.items()},
        "tolerances": {
            "exact, largest": EXACT,
            "half, relative": HALF,
            "bfloat16, relative": BFLOAT16,
            "four bit, relative": FOUR_BIT,
        },
        "agreement": figures,
        "files": files,
    }
    with writing(run.file("export/verify.json")):
        write_json(run.file("export/verify.json"), record)
    return run.file("export/verify.json")


def place(run: RunDir, folder: Path) -> Path:
    """The folder as written down: below the run directory relative to it, elsewhere whole."""
    return folder.relative_to(run.path) if folder.is_relative_to(run.path) else folder


def altered_exports(run: RunDir) -> list[str]:
    """Rehash every file in export/verify.json and name those that are missing or differ.

    An export that was written to scratch, or moved there, and went with it is left out: nothing that is here is wrong.
    """
    record, altered, state = read_record(run), [], read_state(run.path)
    for name, digest in record.get("files", {}).items():
        kind = name.split("/")[1]
        folder = Path(record["folders"].get(kind, f"export/{kind}"))
        if folder.is_absolute() and not is_folder(folder):
            continue
        path = run.path / (folder / Path(*Path(name).parts[2:]) if kind in record["folders"] else name)
        if not (is_there(path) and path.is_file()):
            if state is None or not state.left(name):
                altered.append(f"{name} is missing")
        elif sha256(path) != digest:
            altered.append(f"{name} differs from what was verified")
    return altered


def _same_machine(run: RunDir) -> bool:
    """Whether the exports were written with the device and dtype of now: only then is float32 held to rounding."""
    return run.record(BY_NAME["05_export"]).get("computed_on") == resolve_hardware(run.config.hardware)


def _fits(run: RunDir, merged: Path) -> bool:
    """Whether a model of this size can be loaded in 16 bit, or 32 where the run computes so, on the run's device."""
    stored = sum(shard.size for shard in find_shards(merged)) / GIB
    needed = stored * torch_dtype(run.config).itemsize / 2 * 1.1 + 1.5
    if device(run.config) == "cpu":
        return psutil.virtual_memory().available / GIB > needed
    return (_T4_GIB if run.config.hardware.emulate_t4 else gpus()[0].memory_gib) > needed
