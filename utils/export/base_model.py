"""The 16-bit base that an adapter is merged into: its name, its commit, and the folder that holds it."""

from __future__ import annotations

from pathlib import Path

from utils.errors import ModelError
from utils.files import is_folder
from utils.models.tokenizer import model_source
from utils.schema import EMBEDDED, Config

_SUFFIXES = ("-unsloth-bnb-4bit", "-bnb-4bit")
# What a model folder is loaded from; pickled duplicates and original checkpoints stay where they are.
_WANTED = ["*.safetensors", "*.json", "*.jinja"]


def strip_quantisation(source: str) -> str:
    """A Hub id or folder without the suffix of a pre-quantised repository."""
    return next((source.removesuffix(suffix) for suffix in _SUFFIXES if source.endswith(suffix)), source)


def trained_on(config: Config) -> tuple[str, str | None]:
    """(name, commit) of the model that the adapter was trained on, without any path of this machine."""
    name = config.model.name
    return (Path(name).resolve().name, None) if name != EMBEDDED and is_folder(name) else (name, config.model.revision)


def sixteen_bit_source(config: Config) -> tuple[str, str | None]:
    """(Hub id or folder, commit) of the base in 16 bit: `export.base`, else the configured model, or the sibling that a
    pre-quantised repository was made from, at whichever commit is newest then."""
    if config.export.base:
        return config.export.base, config.export.base_revision
    source = model_source(config)
    sibling = source if is_folder(source) else strip_quantisation(source)
    return sibling, config.model.revision if sibling == source else config.export.base_revision


def merged_into(config: Config) -> tuple[str, str | None]:
    """(name, commit) of the 16-bit base, without any path of this machine; nothing is downloaded."""
    source, revision = sixteen_bit_source(config)
    if not is_folder(source):
        return source, revision
    return (EMBEDDED if config.model.name == EMBEDDED and not config.export.base else Path(source).name), None


def find_base(config: Config) -> tuple[Path, str | None]:
    """(folder, commit) of the 16-bit base, downloaded where it is a Hub id; raises ModelError where it cannot be had."""
    source, revision = sixteen_bit_source(config)
    if is_folder(source):
        return Path(source), None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED, ignore_patterns=["*/*"]))
    except Exception as error:  # offline, unknown, gated: huggingface_hub has a type for each
        raise ModelError(
            f"The 16-bit base {source} is neither a local folder nor reachable on the Hub ({type(error).__name__}); "
            "check the network, or name a local copy: --set export.base=FOLDER."
        ) from None
    return folder, folder.name  # a snapshot's folder is named by its commit
