"""Where a pretrained model comes from, what its folder may hold, and its tokenizer, proven to keep text as it is."""

from contextlib import suppress
from pathlib import Path

from utils.data.hub import ask_hub, explain_hub
from utils.errors import ModelError, first_line
from utils.files import is_folder, parse_json
from utils.hardware import GIB
from utils.models import smollm2
from utils.models.prompt_format import find_end
from utils.schema import EMBEDDED, Config

_SPARE_PADS = ("<|finetune_right_pad_id|>", "<|endoftext|>")
_PROBE = "Hello world, this is a test.\nx"


def model_source(config: Config) -> str:
    """The Hub id or local folder of the base model; the embedded one is built here on first use."""
    if config.model.name == EMBEDDED:
        from utils.models.tiny import ensure_model

        return str(ensure_model())
    if config.model.name == smollm2.NAME:
        return str(smollm2.ensure_smollm2())
    return config.model.name


def check_model(config: Config) -> tuple[str, str | None]:
    """(where the base model will come from, commit to pin or None); ModelError where it cannot be had."""
    name = config.model.name
    if name == EMBEDDED:
        return "embedded: a tiny model, built on this machine", None
    if name == smollm2.NAME:
        rounded = f"SmolLM2-135M-Instruct, rounded to Q4_1 in the package {name} {smollm2.VERSION}"
        return f"{rounded}, in {model_source(config)}", None
    if is_folder(name):
        missing = [file for file in ("config.json", "tokenizer.json") if not (Path(name) / file).exists()]
        if missing:
            raise ModelError(f"The model folder {name} lacks {' and '.join(missing)}; expected a Hugging Face model.")
        return f"local folder {name}", None
    if name.startswith(("/", ".", "~")):
        raise ModelError(f"There is no model folder {name}; check model.name, or give a Hub id such as owner/name.")
    from huggingface_hub import try_to_load_from_cache

    try:
        info = ask_hub("models", name, config.model.revision)
    except Exception as error:  # offline, unknown, gated: huggingface_hub has a type for each
        with suppress(ValueError):  # of what can be no id
            if try_to_load_from_cache(name, "config.json", revision=config.model.revision):
                return f"{name}, from the cache (the Hub is out of reach)", None
        found = f"The model {name} is neither a local folder nor reachable on the Hub"
        raise ModelError(f"{found} ({explain_hub(error)}).") from None
    weights = (file for file in info["siblings"] if file["rfilename"].endswith(".safetensors"))
    size = sum(file.get("size") or 0 for file in weights) / GIB
    return f"{name} at {info['sha'][:12]}, {size:.1f} GiB to download", info["sha"]


def require_safetensors(folder: Path, what: str) -> None:
    """Raise ModelError where a folder's weights are none, or a pickle, which is a program and not data."""
    if not list(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        there = ", ".join(found) or "no weights"
        raise ModelError(f"The {what} folder {folder} holds {there}; expected safetensors files: convert it.")


def load_tokenizer(source: str | Path, revision: str | None = None):
    """The tokenizer, proven to keep spaces and newlines, with a pad token that is not EOS where there is another.

    transformers 5 builds LlamaTokenizerFast without reading tokenizer.json, and DeepSeek's byte-level vocabulary then
    loses every space without an error (transformers issue 45488). Raises ModelError where text does not survive.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(source), revision=revision)
        # What get_tokenizer_config reads, without transformers' auto classes, which take three seconds to import.
        known = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        file = cached_file(str(source), "tokenizer_config.json", **known)
    except Exception as error:  # a damaged file ends in whatever transformers stumbles over: TypeError, KeyError
        expected = "expected a Hub id that can be reached, or a folder with tokenizer.json"
        raise ModelError(f"No tokenizer could be loaded from {source} ({first_line(error)}); {expected}.") from None
    guard_tokenizer(tokenizer, str(source))
    settings = parse_json(Path(file).read_bytes()) if file else {}
    if settings.get("add_bos_token") and tokenizer.bos_token and not tokenizer("").input_ids:
        tokenizer.add_bos_token = True  # R1-Distill-Qwen's; transformers reads it for its own classes only
    tokenizer.eos_token = find_end(tokenizer) or tokenizer.eos_token
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spares = [token for token in _SPARE_PADS if token in tokenizer.get_vocab() and token != tokenizer.eos_token]
        tokenizer.pad_token = spares[0] if spares else tokenizer.eos_token
    return tokenizer


def guard_tokenizer(tokenizer, source: str) -> None:
    """Raise ModelError unless decode(encode(text)) gives the text back, spaces and newlines included."""
    back = tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False))
    if back != _PROBE:
        raise ModelError(f"The tokenizer of {source} corrupts text: {_PROBE!r} came back as {back!r}; take another.")
