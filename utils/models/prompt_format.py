"""The text around a question that fits a chat model: taken from its own template, proven token by token."""

from bisect import bisect_left
from collections.abc import Sequence

from utils.data.prompts import USER, find_format
from utils.errors import ModelError, first_line
from utils.schema import PromptFormat

_CLOSE = "</think>"
_DATE = "26 Jul 2024"  # Llama 3.2's template writes today's otherwise: another prompt every day
_QUESTION, _REASONING, _ANSWER = "⟦question⟧", "⟦reasoning⟧", "⟦answer⟧"
_NO_END = "The tokenizer names no end token, so no answer would ever end; take another model."
_TURNS = [
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": f"<think>\n{_REASONING}\n</think>\n\n{_ANSWER}"},
]


def make_prompt_format(style: str, tokenizer) -> PromptFormat:
    """The text around a question and its answer that fits the tokenizer; ModelError where `style` does not."""
    if style == "auto":
        style = "native" if USER in tokenizer.get_vocab() else "chat"
    if style == "chat":
        return _from_template(tokenizer)
    if style == "native" and USER not in tokenizer.get_vocab():
        raise ModelError(f"prompt.style is native, but {USER} is no token of this model; take auto or chat.")
    if tokenizer.eos_token_id is None:
        raise ModelError(_NO_END)
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


def find_end(tokenizer) -> str | None:
    """The token that ends the assistant's turn in the tokenizer's own chat template; None where there is none."""
    try:
        rest = _render(tokenizer, _TURNS).partition(_ANSWER)[2] if tokenizer.chat_template else ""
    except ModelError:  # said where the template is needed
        return None
    ends = [str(token) for token in tokenizer.added_tokens_decoder.values() if rest.startswith(str(token))]
    return max(ends, key=len, default=None)


def check_training_text(tokenizer, prompt: str, completion: str) -> None:
    """Raise ModelError unless a row's tokens are its prompt's and its completion's, with one BOS or none and one end token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError(_NO_END)
    ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tail = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    added = len(ids) - len(plain) - len(tail)
    if ids[added:] != plain + tail or added not in (0, 1):
        raise ModelError("The tokenizer joins prompt and completion in one token; take another prompt.style or model.")
    if added and (ids[0] != tokenizer.bos_token_id or plain[0] == tokenizer.bos_token_id):
        raise ModelError("The tokens begin with two BOS, or with a token that is none; take another prompt.style.")
    if tail.count(end) != 1 or tail[-1] != end:
        found = f"A completion holds {tail.count(end)} end tokens ({tokenizer.eos_token})"
        raise ModelError(f"{found}, expected one, last.")


def tokenize_row(tokenizer, prompt: str, completion: str) -> dict[str, list[int]]:
    """A training row's `input_ids`, and each id's `part`: 0 prompt, 1 reasoning, 2 response and EOS."""
    text = prompt + completion + tokenizer.eos_token
    encoded = tokenizer(text, return_offsets_mapping=True)
    border = len(prompt) + (completion.index(_CLOSE) + len(_CLOSE) if _CLOSE in completion else 0)
    parts = [0 if start < len(prompt) else 1 if start < border else 2 for start, _ in encoded["offset_mapping"]]
    return {"input_ids": encoded["input_ids"], "part": parts}


def count_reasoning(tokenizer, ids: Sequence[int]) -> int:
    """How many tokens of a completion go up to and with `</think>`, of however many tokens that is; all without one."""
    before = bisect_left(range(len(ids)), True, key=lambda i: _CLOSE in tokenizer.decode(ids[: i + 1]))
    return min(before + 1, len(ids))
