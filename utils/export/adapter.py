"""What others can load: the adapter in one folder, the merged model in another, each complete on its own.

Each folder is one repository: weights, tokenizer, chat template and a card, ready to be uploaded as it is.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from utils.errors import ModelError
from utils.export.base_model import Base, base_name, find_base, trained_on
from utils.export.chat_template import fit_chat_template, write_modelfile
from utils.export.gguf import file_name, write_gguf
from utils.export.llama_cpp import find_llama_cpp, how_to_get_it, install_llama_cpp
from utils.export.merge import Merged, merge_shards, read_lora
from utils.export.shards import find_shards
from utils.files import atomic_folder, write_json, writing
from utils.hardware import GIB, free_disk_gib, require_disk, where
from utils.models.tokenizer import load_tokenizer, model_source
from utils.pipeline.run_dir import RunDir
from utils.project import NAME
from utils.schema import GgufType

_SPARE_GIB = 1.0  # left free beside the merged model, for the report and the next checkpoint
# What transformers 5 notes about this machine and this loading; of no use to others.
_LOCAL_KEYS = ("is_local", "local_files_only", "backend", "name_or_path")


def copy_adapter(run: RunDir) -> Path:
    """export/adapter: the trained adapter, which names its base and commit, with tokenizer and chat template beside it."""
    name, revision = trained_on(run.config)
    source = run.file("training/adapter")
    settings = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    _check_base(settings, run, name)
    with _writable(run.file("export/adapter")) as folder:
        shutil.copyfile(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": name, "revision": revision})
        save_tokenizer(run, folder)
    return run.file("export/adapter")


def merge_adapter(run: RunDir) -> tuple[Path, Base, Merged]:
    """export/merged: the adapter folded into the 16-bit base, shard by shard; returns folder, base and figures.

    On Kaggle it goes to scratch where the working directory is too small. Raises HardwareError where no disk is large
    enough, ModelError where base and adapter do not belong together or a weight is not finite, RunDirError where the
    target cannot be written. A half-written folder never has the final name, and an earlier one stays until then.
    """
    base = find_base(run.config)
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ModelError(
            f"{base.name} is quantised, and merging into quantised weights rounds twice; name the 16-bit model: "
            "--set export.base=OWNER/NAME."
        )
    lora = read_lora(run.file("export/adapter"))
    size = sum(shard.size for shard in find_shards(base.folder)) / GIB
    target = choose_place(run, "merged", size)
    with _writable(target, size) as folder:
        merged = merge_shards(base.folder, lora, folder)
        # As published: transformers 5 would write keys that version 4, vLLM and llama.cpp read otherwise.
        write_json(folder / "config.json", {key: value for key, value in config.items() if key != "_name_or_path"})
        if (base.folder / "generation_config.json").exists():
            shutil.copyfile(base.folder / "generation_config.json", folder / "generation_config.json")
        save_tokenizer(run, folder)
    return target, base, merged


def write_ggufs(run: RunDir, folders: Mapping[str, Path], merged: Merged) -> tuple[Path | None, dict[str, int]]:
    """export/gguf: the merged model and the LoRA for llama.cpp, and a Modelfile for Ollama; (None, {}) without llama.cpp.

    Returns the folder, and for each file how many tensors had to be stored more finely than asked.
    """
    tree = find_llama_cpp() or (install_llama_cpp() if run.config.export.install_llama_cpp else None)
    if tree is None:
        set_aside(run, "gguf")
        print(how_to_get_it(run.path))
        return None, {}
    kinds, config = run.config.export.gguf, run.config
    half = sum(math.prod(t.shape) for shard in find_shards(folders["merged"]) for t in shard.tensors) * 2 / GIB
    size = half * (1 + 0.54 * ("q8_0" in kinds) + 0.32 * ("q4_k_m" in kinds))  # 8.5 and 4.9 of 16 bits, and a little
    target = choose_place(run, "gguf", size)
    with _writable(target, size) as folder:
        finer = write_gguf(tree, folders["merged"], folders["adapter"], folder, kinds, merged.largest_weight)
        smallest = file_name(max(kinds, key=get_args(GgufType).index))
        text = write_modelfile(smallest, config.prompt.style, config.generate, config.model.max_seq_length)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    return target, finer


def save_tokenizer(run: RunDir, folder: Path) -> None:
    """The tokenizer, with a chat template that gives the training prompt, as every version of transformers loads it.

    Version 5 names the class TokenizersBackend, which version 4 and what rests on it do not know.
    """
    tokenizer = load_tokenizer(model_source(run.config), run.config.model.revision)
    fit_chat_template(tokenizer, run.config.prompt.style)
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
    set_aside(run, kind)
    print(f"{run.path} has no room for {needed_gib:.1f} GiB: written to {scratch}, which is not kept with the output")
    return scratch


def set_aside(run: RunDir, kind: str) -> None:
    """Rename an earlier run's export/KIND, so that it is not taken for this run's where none is written there."""
    earlier, aside = run.file(f"export/{kind}"), run.file(f"export/{kind}.previous")
    if earlier.exists():
        shutil.rmtree(aside, ignore_errors=True)
        earlier.rename(aside)


def _check_base(settings: dict, run: RunDir, name: str) -> None:
    """Raise ModelError where the adapter says that it was trained on another base than this run's."""
    recorded = settings.get("base_model_name_or_path")
    ours = {base_name(value) for value in (name, model_source(run.config))}
    if recorded and base_name(recorded) not in ours:
        raise ModelError(
            f"The adapter was trained on {recorded}, this run's base is {name}; run 03 again, or set model.name."
        )


@contextmanager
def _writable(target: Path, needed_gib: float = 0.1) -> Iterator[Path]:
    """A scratch folder that becomes `target`; what the disk refuses is told in a sentence, with numbers."""
    with writing(target, needed_gib), atomic_folder(target) as folder:
        yield folder
