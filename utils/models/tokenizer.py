"""Where a pretrained model comes from, what its folder may hold, and its tokenizer, proven to keep text as it is."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from utils.data.prompts import USER, find_format
from utils.errors import ModelError
from utils.files import is_folder
from utils.hardware import GIB
from utils.schema import EMBEDDED, Config, PromptFormat

_SPARE_PADS = ("<|finetune_right_pad_id|>", "<|endoftext|>")
_DATE = "26 Jul 2024"  # Llama 3.2's template writes today's otherwise: another prompt every day
_QUESTION, _REASONING, _ANSWER = "⟦question⟧", "⟦reasoning⟧", "⟦answer⟧"
_TURNS = [
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": f"<think>\n{_REASONING}\n</think>\n\n{_ANSWER}"},
]
_PROBE = "Hello world, this is a test.\nx"


def model_source(config: Config) -> str:
    """The Hub id or local folder of the base model; the embedded one is built here on first use."""
    if config.model.name == EMBEDDED:
        from utils.models.tiny import ensure_model

        return str(ensure_model())
    return config.model.name


def check_model(config: Config) -> tuple[str, str | None]:
    """Where the base model will come from, in words, and the commit to pin where it comes from the Hub.

    Raises ModelError where it is neither here nor reachable.
    """
    name = config.model.name
    if name == EMBEDDED:
        return "embedded: a tiny model, built on this machine", None
    if is_folder(name):
        missing = [file for file in ("config.json", "tokenizer.json") if not (Path(name) / file).exists()]
        if missing:
            raise ModelError(f"The model folder {name} lacks {' and '.join(missing)}; expected a Hugging Face model.")
        return f"local folder {name}", None
    if name.startswith(("/", ".", "~")):
        raise ModelError(f"There is no model folder {name}; check model.name, or give a Hub id such as owner/name.")
    from huggingface_hub import model_info, try_to_load_from_cache

    try:
        info = model_info(name, revision=config.model.revision, files_metadata=True)
    except Exception as error:  # offline, unknown, gated: huggingface_hub has a type for each
        if try_to_load_from_cache(name, "config.json", revision=config.model.revision):
            return f"{name}, from the cache (the Hub is out of reach)", None
        raise ModelError(
            f"The model {name} is neither a local folder nor reachable on the Hub ({type(error).__name__}); "
            "check model.name and the network."
        ) from None
    size = sum(file.size or 0 for file in info.siblings if file.rfilename.endswith(".safetensors")) / GIB
    return f"{name} at {info.sha[:12]}, {size:.1f} GiB to download", info.sha


def require_safetensors(folder: Path, what: str) -> None:
    """Raise ModelError where a folder's weights are none, or a pickle, which is a program and not data."""
    if not list(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise ModelError(
            f"The {what} folder {folder} holds {', '.join(found) or 'no weights'}; expected safetensors files: convert it, "
            "or take another."
        )


def load_tokenizer(source: str | Path, revision: str | None = None):
    """The tokenizer as PreTrainedTokenizerFast, proven to keep spaces and newlines, with a pad token that is not EOS.

    transformers 5 builds LlamaTokenizerFast without reading tokenizer.json, and DeepSeek's byte-level vocabulary then
    loses every space without an error (transformers issue 45488). Raises ModelError where text does not survive.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(source), revision=revision)
    except BaseException as error:  # a damaged file ends in whatever transformers stumbles over: TypeError, KeyError
        if not _is_of_the_file(error):
            raise
        raise ModelError(
            f"No tokenizer could be loaded from {source} ({first_line(error)}); expected a Hub id that can be "
            "reached, or a local folder with tokenizer.json."
        ) from None
    guard_tokenizer(tokenizer, str(source))
    flags = get_tokenizer_config(str(source), revision=revision)
    if flags.get("add_bos_token") and tokenizer.bos_token and not tokenizer("").input_ids:
        tokenizer.add_bos_token = True  # R1-Distill-Qwen's; transformers reads it for its own classes only
    tokenizer.eos_token = find_end(tokenizer) or tokenizer.eos_token
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spares = [token for token in _SPARE_PADS if token in tokenizer.get_vocab() and token != tokenizer.eos_token]
        tokenizer.pad_token = spares[0] if spares else tokenizer.eos_token
    return tokenizer


def find_end(tokenizer) -> str | None:
    """The token that ends the assistant's turn in the tokenizer's own chat template; None where there is none."""
    try:
        rest = _render(tokenizer, _TURNS).partition(_ANSWER)[2] if tokenizer.chat_template else ""
    except ModelError:  # said where the template is needed
        return None
    ends = [str(token) for token in tokenizer.added_tokens_decoder.values() if rest.startswith(str(token))]
    return max(ends, key=len, default=None)


def make_prompt_format(style: str, tokenizer) -> PromptFormat:
    """The text around a question and its answer that fits the tokenizer; `style` is a `prompt.style`.

    `chat` is the model's own template for the user's turn, with a think block opened where the template does not.
    Raises ModelError where the style does not fit: no chat template, or one that closes, drops or moves the think block;
    no end token, or none that is one token.
    """
    if style == "auto":
        style = "native" if USER in tokenizer.get_vocab() else "chat"
    if style == "chat":
        return _from_template(tokenizer)
    if style == "native" and USER not in tokenizer.get_vocab():
        raise ModelError(f"prompt.style is native, but {USER} is no token of this model; take auto or chat.")
    if tokenizer.eos_token_id is None:
        raise ModelError("The tokenizer names no end token, so no answer would ever end; take another model.")
    return find_format(style).model_copy(update={"end": tokenizer.eos_token})


def _from_template(tokenizer) -> PromptFormat:
    hint = "take prompt.style=tutorial, or another model."
    if not tokenizer.chat_template:
        raise ModelError(f"prompt.style is chat, but the tokenizer has no chat template; {hint}")
    prompt, whole = _render(tokenizer, _TURNS[:1], add_generation_prompt=True), _render(tokenizer, _TURNS)
    before, question, after = prompt.partition(_QUESTION)
    if not question or _QUESTION in after or _QUESTION not in whole:
        raise ModelError(f"The chat template does not give the question once, as it is; {hint}")
    if tokenizer("").input_ids == [tokenizer.bos_token_id]:
        before = before.removeprefix(tokenizer.bos_token)  # the tokenizer adds it
    opens = after.rstrip().endswith("<think>")
    if not opens and "</think>" in after:
        raise ModelError(f"The chat template closes the think block before the answer begins; {hint}")
    places = [whole.find(part, whole.index(_QUESTION)) for part in ("<think>", _REASONING, "</think>", _ANSWER)]
    dropped = _REASONING not in whole
    if places[-1] < 0 or (dropped and not opens):
        raise ModelError(f"The chat template drops an answer's think block and opens none itself; {hint}")
    if not dropped and (min(places) < 0 or places != sorted(places)):
        raise ModelError(f"The chat template moves an answer's think block away from before the response; {hint}")
    end = find_end(tokenizer)
    if end is None:
        raise ModelError(f"The chat template ends an answer with no token of its own, so none would ever end; {hint}")
    after = after if opens else f"{after}<think>\n"
    lead = "" if after.endswith("\n") else "\n"
    return PromptFormat(style="chat", before=before, after=after, lead=lead, close="\n</think>\n\n", end=end)


def _render(tokenizer, turns: list[dict[str, str]], **options) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, date_string=_DATE, **options)
    except Exception as error:  # a template is a program of somebody else's
        raise ModelError(f"The chat template cannot be used ({first_line(error)}); take another model.") from None


def guard_tokenizer(tokenizer, source: str) -> None:
    """Raise ModelError unless decode(encode(text)) gives the text back, spaces and newlines included."""
    try:
        back = tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False))
    except BaseException as error:  # tokenizers raises plain Exception
        if not _is_of_the_file(error):
            raise
        raise ModelError(f"The tokenizer of {source} cannot be used ({first_line(error)}); fetch it again.") from None
    if back != _PROBE:
        raise ModelError(
            f"The tokenizer of {source} corrupts text: {_PROBE!r} came back as {back!r}; "
            "load it as PreTrainedTokenizerFast from a folder with a byte-level tokenizer.json."
        )


def check_training_text(tokenizer, prompt: str, completion: str) -> None:
    """Raise ModelError unless a row's tokens are its prompt's and its completion's, with BOS as the tokenizer adds it
    (once or never) and one end token, the last.

    A doubled BOS shifts a model out of what it was trained on; without the end token it never learns to stop; and where
    the prompt's last token swallows the completion's first, the loss mask is off by one.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError(
            "The tokenizer names no end token, so no answer would ever end; take a tokenizer with eos_token."
        )
    ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tail = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    added = len(ids) - len(plain) - len(tail)
    if ids[added:] != plain + tail or added not in (0, 1):
        raise ModelError(
            "The tokenizer joins the end of the prompt and the beginning of the completion, so the loss could not tell them "
            "apart; take another prompt.style or model."
        )
    if added and (ids[0] != tokenizer.bos_token_id or plain[0] == tokenizer.bos_token_id):
        raise ModelError(
            "The tokens begin with two BOS, or with a token that is none; the prompt must not bring its own."
        )
    if tail.count(end) != 1 or tail[-1] != end:
        raise ModelError(
            f"A completion holds {tail.count(end)} end tokens ({tokenizer.eos_token}), expected one, the last."
        )


def count_reasoning(tokenizer, ids: Sequence[int]) -> int:
    """How many tokens of a completion go up to and with `</think>`, of however many tokens that is; all without one."""
    before = bisect_left(range(len(ids)), True, key=lambda i: "</think>" in tokenizer.decode(ids[: i + 1]))
    return min(before + 1, len(ids))


def _is_of_the_file(error: BaseException) -> bool:
    """Whether reading the file raised it, and not Ctrl-C: tokenizers is Rust, whose panics are no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, cut to what fits into a sentence; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
