"""What others can load: the adapter in one folder, the merged model in another, each complete and a repository of its own."""

import shutil
from functools import partial
from pathlib import Path

from utils.data.hub import explain_hub
from utils.errors import ModelError
from utils.export.chat_template import fit_chat_template
from utils.export.merge import INDEX, find_shards, merge_shards, read_lora
from utils.export.places import scratch_folder
from utils.files import atomic_folder, is_folder, read_json, write_json
from utils.hardware import GIB, free_disk_gib, hub_cache, require_disk
from utils.models import smollm2
from utils.models.tokenizer import load_tokenizer, model_source
from utils.pipeline.run_dir import RunDir
from utils.pipeline.stage import StageRun
from utils.schema import EMBEDDED, Config

_SETTINGS = ["*.json", "*.jinja"]
# What transformers 5 notes about this machine and this loading; of no use to others.
_LOCAL_KEYS = ("is_local", "local_files_only", "backend", "name_or_path")


def copy_adapter(run: RunDir) -> Path:
    """export/adapter: the trained adapter, which names its base and commit, with tokenizer and chat template beside it."""
    name, revision = trained_on(run.config)
    source, target = run.file("training/adapter"), run.file("export/adapter")
    settings = read_json(source / "adapter_config.json")
    with atomic_folder(target) as folder:
        shutil.copyfile(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": name, "revision": revision})
        save_tokenizer(run, folder)
    return target


def merge_adapter(run: StageRun, target: Path | None) -> Path | None:
    """The adapter folded into the 16-bit base, shard by shard, in `target`; None where a plan has no place for it.

    The base's commit is pinned. Where the disk is short, it is fetched shard by shard, each deleted before the next one.
    Raises HardwareError where the disk is too small all the same, ModelError where base and adapter do not fit.
    """
    if target is None:
        shutil.rmtree(run.file("export/merged"), ignore_errors=True)  # an earlier run's
        return None
    sizes, commit = measure_base(run.config)
    scratch, needed = scratch_folder(run, "base"), sum(sizes.values())
    shutil.rmtree(scratch, ignore_errors=True)  # of a merge that was killed
    fetch = partial(_download, sixteen_bit_source(run.config)[0], commit, local_dir=scratch) if commit else None
    base, revision = (Path(fetch(_SETTINGS)), commit) if fetch else find_base(run.config)
    lora = read_lora(run.file("export/adapter"))
    with atomic_folder(target) as folder:
        if fetch and base.stat().st_dev == folder.stat().st_dev:  # the shard lies on the same disk
            needed += max(sizes.values())
        require_disk(target.parent, needed / GIB + 0.05, f"export/{target.name}")
        merge_shards(base, lora, folder, fetch)
        # As published: transformers 5 would write keys that version 4, vLLM and llama.cpp read otherwise.
        config = read_json(base / "config.json")
        write_json(folder / "config.json", {key: value for key, value in config.items() if key != "_name_or_path"})
        if (base / "generation_config.json").exists():
            shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
        save_tokenizer(run, folder)
    shutil.rmtree(scratch, ignore_errors=True)
    if revision:
        run.pin("export.base_revision", revision)
    print(f"{len(lora.factors)} tensors changed, written to {target}")
    return target


def save_tokenizer(run: RunDir, folder: Path) -> None:
    """The tokenizer, with a chat template that gives the training prompt, as every version of transformers loads it."""
    tokenizer = load_tokenizer(model_source(run.config), run.config.model.revision)
    fit_chat_template(tokenizer, run.config.prompt)
    tokenizer.save_pretrained(str(folder))
    settings = read_json(folder / "tokenizer_config.json")
    kept = {key: value for key, value in settings.items() if key not in _LOCAL_KEYS}
    # Version 5 names the class TokenizersBackend, which version 4 and what rests on it do not know.
    write_json(folder / "tokenizer_config.json", kept | {"tokenizer_class": "PreTrainedTokenizerFast"})


def trained_on(config: Config) -> tuple[str, str | None]:
    """(name, commit) of the model that the adapter was trained on, without any path of this machine."""
    name = config.model.name
    if name == smollm2.NAME:
        return smollm2.ORIGINAL, None
    return (Path(name).resolve().name, None) if name != EMBEDDED and is_folder(name) else (name, config.model.revision)


def sixteen_bit_source(config: Config) -> tuple[str, str | None]:
    """(Hub id or folder, commit) of the base in 16 bit: `export.base`, else the configured model, or the sibling that a
    pre-quantised repository was made from, at whichever commit is newest then."""
    if config.export.base:
        return config.export.base, config.export.base_revision
    source = model_source(config)
    sibling = source if is_folder(source) else source.removesuffix("-bnb-4bit").removesuffix("-unsloth")
    return sibling, config.model.revision if sibling == source else config.export.base_revision


def merged_into(config: Config) -> tuple[str, str | None]:
    """(name, commit) of the 16-bit base, without any path of this machine; nothing is downloaded."""
    source, revision = sixteen_bit_source(config)
    if not is_folder(source):
        return source, revision
    return (Path(source).resolve().name, None) if config.export.base else trained_on(config)


def find_base(config: Config) -> tuple[Path, str | None]:
    """(folder, commit) of the 16-bit base, downloaded where it is a Hub id; raises ModelError where it cannot be had."""
    source, revision = sixteen_bit_source(config)
    if is_folder(source):
        return Path(source), None
    folder = Path(_download(source, revision, [*_SETTINGS, "*.safetensors"]))
    return folder, folder.name  # a snapshot's folder is named by its commit


def measure_base(config: Config) -> tuple[dict[str, int], str | None]:
    """({shard of the 16-bit base: bytes}, the Hub's commit where the disk is too short to keep them); raises ModelError."""
    source, revision = sixteen_bit_source(config)
    local = is_folder(source)
    try:
        folder = Path(source if local else _download(source, revision, ["*.safetensors"], local_files_only=True))
        return {path.name: path.stat().st_size for path in find_shards(folder)}, None
    except ModelError:  # not all of it is in the cache
        if local:
            raise
    folder = Path(_download(source, revision, [INDEX]))
    names = {path.name for path in find_shards(folder, complete=False)}  # some repositories hold other weights beside
    found = [file for file in _download(source, revision, ["*.safetensors"], dry_run=True) if file.filename in names]
    if not found:
        raise ModelError(f"{source} holds no safetensors files; name another model in export.base.")
    sizes = {file.filename: file.file_size for file in found}
    needed = 3 * sum(sizes.values())  # for the base, the merged model, and GGUF's f16 of it
    return sizes, found[0].commit_hash if free_disk_gib(hub_cache()) * GIB < needed else None


def _download(source: str, revision: str | None, wanted: list[str], **options):
    """`snapshot_download` of files by the names `wanted`, none of those in folders; raises ModelError where it cannot."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"], **options)
    except Exception as error:  # offline, unknown, gated: huggingface_hub has a type for each
        found = f"The 16-bit base {source} is no folder and cannot be fetched ({explain_hub(error)})"
        raise ModelError(f"{found}, or name a copy: --set export.base=FOLDER.") from None
