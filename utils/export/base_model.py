"""The 16-bit base that an adapter is merged into: its name, its commit, and the folder that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.errors import ModelError
from utils.files import is_folder
from utils.models.tokenizer import model_source
from utils.schema import EMBEDDED, Config

_SUFFIXES = ("-unsloth-bnb-4bit", "-bnb-4bit")
# What a model folder is loaded from; pickled duplicates and original checkpoints stay where they are.
_WANTED = ["*.safetensors", "*.json", "*.jinja"]


@dataclass(frozen=True)
class Base:
    """A base model on disk. `name` is its Hub id, or the last part of a local folder; `revision` its commit, if any."""

    name: str
    revision: str | None
    folder: Path


def base_name(source: str) -> str:
    """What a Hub id or a folder is called, blind to owner, place, case and quantisation: for comparing two of them."""
    name = Path(source).name.lower()
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


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
    for suffix in _SUFFIXES:
        if not is_folder(source) and source.endswith(suffix):
            return source.removesuffix(suffix), config.export.base_revision
    return source, config.model.revision


def find_base(config: Config) -> Base:
    """The 16-bit base on this disk, downloaded where it is a Hub id; raises ModelError where it cannot be had."""
    source, revision = sixteen_bit_source(config)
    if is_folder(source):
        name = config.model.name if config.model.name == EMBEDDED and not config.export.base else Path(source).name
        return Base(name, None, Path(source))
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED, ignore_patterns=["*/*"]))
    except Exception as error:  # offline, unknown, gated: huggingface_hub has a type for each
        raise ModelError(
            f"The 16-bit base {source} is neither a local folder nor reachable on the Hub ({type(error).__name__}); "
            "check the network, or name a local copy: --set export.base=FOLDER."
        ) from None
    return Base(source, folder.name, folder)  # a snapshot's folder is named by its commit
