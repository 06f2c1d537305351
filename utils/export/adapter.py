"""What others can load: the adapter in one folder, the merged model in another, each complete and a repository of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.errors import ModelError
from utils.export.base_model import find_base, merged_into, strip_quantisation, trained_on
from utils.export.chat_template import fit_chat_template
from utils.export.merge import find_shards, merge_shards, read_lora
from utils.files import atomic_folder, write_json, writing
from utils.hardware import GIB, free_disk_gib, require_disk, where
from utils.models.tokenizer import load_tokenizer, model_source
from utils.pipeline.run_dir import RunDir
from utils.project import NAME

_SPARE_GIB = 1.0  # left free beside the merged model, for the report and the next checkpoint
# What transformers 5 notes about this machine and this loading; of no use to others.
_LOCAL_KEYS = ("is_local", "local_files_only", "backend", "name_or_path")


@dataclass(frozen=True)
class Merged:
    """Where a merged model is, the commit of its base, and how many of its tensors were changed."""

    folder: Path
    base_revision: str | None
    tensors: int


def copy_adapter(run: RunDir) -> Path:
    """export/adapter: the trained adapter, which names its base and commit, with tokenizer and chat template beside it."""
    name, revision = trained_on(run.config)
    source = run.file("training/adapter")
    settings = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    recorded, ours = settings.get("base_model_name_or_path"), (name, model_source(run.config))
    if recorded and _short_name(recorded) not in map(_short_name, ours):
        raise ModelError(
            f"The adapter was trained on {recorded}, this run's base is {name}; run 03 again, or set model.name."
        )
    with new_folder(run.file("export/adapter")) as folder:
        shutil.copyfile(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": name, "revision": revision})
        save_tokenizer(run, folder)
    return run.file("export/adapter")


def merge_adapter(run: RunDir) -> Merged | None:
    """export/merged: the adapter folded into the 16-bit base, shard by shard; None where export.merged is off.

    On Kaggle it goes to scratch where the working directory is too small. Raises HardwareError where no disk is large
    enough, ModelError where base and adapter do not belong together or a weight is not finite, RunDirError where the
    target cannot be written. A half-written folder never has the final name, and an earlier one stays until then.
    """
    if not run.config.export.merged:
        keep_previous(run, "merged")
        return None
    base, revision = find_base(run.config)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ModelError(
            f"{merged_into(run.config)[0]} is quantised, and merging into quantised weights rounds twice; name the 16-bit model: "
            "--set export.base=OWNER/NAME."
        )
    lora, size = read_lora(run.file("export/adapter")), weights_gib(base)
    target = choose_place(run, "merged", size)
    with new_folder(target, size) as folder:
        merge_shards(base, lora, folder)
        # As published: transformers 5 would write keys that version 4, vLLM and llama.cpp read otherwise.
        write_json(folder / "config.json", {key: value for key, value in config.items() if key != "_name_or_path"})
        if (base / "generation_config.json").exists():
            shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
        save_tokenizer(run, folder)
    return Merged(target, revision, len(lora.factors))


def weights_gib(folder: Path) -> float:
    """What a model's weights take on the disk."""
    return sum(path.stat().st_size for path in find_shards(folder)) / GIB


def save_tokenizer(run: RunDir, folder: Path) -> None:
    """The tokenizer, with a chat template that gives the training prompt, as every version of transformers loads it.

    Version 5 names the class TokenizersBackend, which version 4 and what rests on it do not know.
    """
    tokenizer = load_tokenizer(model_source(run.config), run.config.model.revision)
    fit_chat_template(tokenizer, run.config.prompt)
    tokenizer.save_pretrained(str(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in _LOCAL_KEYS}
    write_json(folder / "tokenizer_config.json", kept | {"tokenizer_class": "PreTrainedTokenizerFast"})


def choose_place(run: RunDir, kind: str, needed_gib: float) -> Path:
    """export/KIND where `needed_gib` and a little more are free; on Kaggle, whose output is small, else scratch."""
    target = run.file(f"export/{kind}")
    if where() != "kaggle" or free_disk_gib(target) >= needed_gib + _SPARE_GIB:
        require_disk(target.parent, needed_gib + 0.05, f"export/{kind}")
        return target
    scratch = Path(tempfile.gettempdir()) / NAME / run.path.name / kind
    require_disk(scratch, needed_gib + 0.05, f"export/{kind}, for which the working directory is too small,")
    keep_previous(run, kind)
    print(f"{run.path} has no room for {needed_gib:.1f} GiB: written to {scratch}, which is not kept with the output")
    return scratch


def keep_previous(run: RunDir, kind: str) -> None:
    """Rename an earlier run's export/KIND, so that it is not taken for this run's where none is written there."""
    earlier, previous = run.file(f"export/{kind}"), run.file(f"export/{kind}.previous")
    if earlier.exists():
        shutil.rmtree(previous, ignore_errors=True)
        earlier.rename(previous)


@contextmanager
def new_folder(target: Path, needed_gib: float = 0.1) -> Iterator[Path]:
    """A scratch folder that becomes `target`; what the disk refuses is a sentence with numbers."""
    with writing(target, needed_gib), atomic_folder(target) as folder:
        yield folder


def _short_name(source: str) -> str:
    """A Hub id or folder blind to owner, place, case and quantisation."""
    return strip_quantisation(Path(source).name.lower())
