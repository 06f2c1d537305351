"""What a loaded model finds likely: each held-out row's completion, and the letter after reasoning that was cut off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from utils.errors import ModelError, OutOfMemory
from utils.evaluation.answer_parsing import CLOSE
from utils.evaluation.metrics import needs_forcing
from utils.evaluation.questions import Question, forced_key
from utils.files import write_text
from utils.models.memory import free_memory, is_out_of_memory
from utils.progress import Progress, track
from utils.sealed import read_lines, to_lines

_NLL_TOKENS = 2048  # tokens in one forward pass; logits over 128k entries bound it
CUE = "The answer is"
_SAME_BASE = 0.02


def tokenize_row(tokenizer, prompt: str, completion: str) -> dict[str, list[int]]:
    """Token ids of a training row as the trainer makes them (BOS + prompt + completion + EOS), and what each is.

    Returns `input_ids` and `part`: 0 prompt, 1 reasoning (up to and with `</think>`), 2 response and EOS.
    """
    text = prompt + completion + tokenizer.eos_token
    encoded = tokenizer(text, return_offsets_mapping=True)
    border = len(prompt) + (completion.index(CLOSE) + len(CLOSE) if CLOSE in completion else 0)
    parts = [0 if start < len(prompt) else 1 if start < border else 2 for start, _ in encoded["offset_mapping"]]
    return {"input_ids": encoded["input_ids"], "part": parts}


def completion_nll(model, tokenizer, rows: pd.DataFrame, max_length: int) -> pd.DataFrame:
    """Negative log-likelihood (nats) of each row's completion given its prompt, reasoning and response apart.

    `rows` has id, prompt and completion. Returns id, reasoning_nll, reasoning_tokens, response_nll, response_tokens,
    sums over tokens. Rows longer than `max_length` tokens are left out, never cut.
    Raises OutOfMemory where a single row does not fit into memory.
    """
    import torch

    encoded = [tokenize_row(tokenizer, row.prompt, row.completion) for row in rows.itertuples()]
    waiting = [i for i, row in enumerate(encoded) if len(row["input_ids"]) <= max_length]
    waiting.sort(key=lambda i: len(encoded[i]["input_ids"]))
    results, limit = {}, _NLL_TOKENS
    with Progress("scoring held-out rows", len(waiting), "row") as bar, torch.inference_mode():
        while waiting:
            count = _count_within(limit, [len(encoded[i]["input_ids"]) for i in waiting])
            sums = _try_nll(model, tokenizer, [encoded[i] for i in waiting[:count]])
            if sums is None:
                if count == 1:
                    raise OutOfMemory("A single held-out row does not fit into memory; lower model.max_seq_length.")
                limit //= 2
                free_memory(model)
                continue
            for i, values in zip(waiting[:count], sums, strict=True):
                results[i] = {"id": rows["id"].iloc[i], **values}
            waiting = waiting[count:]
            bar.update(count)
    types = {"reasoning_nll": float, "reasoning_tokens": int, "response_nll": float, "response_tokens": int}
    return pd.DataFrame([results[i] for i in sorted(results)], columns=["id", *types]).astype(types)


def _count_within(limit: int, lengths: Sequence[int]) -> int:
    """How many of the rows (ascending lengths) fit into one padded batch of at most `limit` tokens; at least 1."""
    return max([1, *(n for n, length in enumerate(lengths, start=1) if n * length <= limit)])


def _try_nll(model, tokenizer, batch: list[dict]) -> list[dict] | None:
    try:
        return _nll_of_batch(model, tokenizer, batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def _nll_of_batch(model, tokenizer, batch: list[dict]) -> list[dict]:
    """Right-padded and without a mask: causal attention keeps padding from reaching the tokens before it."""
    import torch

    width = max(len(row["input_ids"]) for row in batch)
    ids = torch.full((len(batch), width), tokenizer.pad_token_id)
    for i, row in enumerate(batch):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    sums = []
    for i, row in enumerate(batch):
        length = len(row["input_ids"])
        target = torch.tensor(row["input_ids"][1:], device=logits.device)
        nll = torch.nn.functional.cross_entropy(logits[i, : length - 1].float(), target, reduction="none").cpu()
        part = torch.tensor(row["part"][1:])
        sums.append(
            {
                f"{name}_{kind}": value
                for name, code in (("reasoning", 1), ("response", 2))
                for kind, value in (
                    ("nll", float(nll[part == code].double().sum())),
                    ("tokens", int((part == code).sum())),
                )
            }
        )
    return sums


def check_same_base(model, tokenizer, rows: pd.DataFrame, baseline: pd.DataFrame, count: int = 8) -> float:
    """The largest relative deviation of the loss on `count` rows, adapter switched off, from what 01 measured.

    Both arms must rest on the very same base: another file, quantisation or kernel would be compared as fine-tuning.
    Raises ModelError above 2 % (4-bit in fp16 moves by about a tenth of that from run to run).
    """
    known = baseline.set_index("id")
    chosen = rows[rows["id"].isin(known.index)].head(count)
    with model.disable_adapter():
        now = completion_nll(model, tokenizer, chosen, max_length=10**9).set_index("id")
    before = known.loc[now.index]
    columns = ["reasoning_nll", "response_nll"]
    deviation = ((now[columns].sum(axis=1) / before[columns].sum(axis=1)) - 1).abs()
    worst = float(deviation.max()) if len(deviation) else 0.0
    if worst > _SAME_BASE:
        raise ModelError(
            f"With the adapter switched off the loss differs by {worst:.1%} from the baseline's; this is not the base "
            "model that answered in 01: run 01_baseline_inference here again."
        )
    return worst


def forced_letters(
    model, tokenizer, questions: Sequence[Question], answers: Sequence[dict], items: pd.DataFrame | None, path: Path
) -> list[dict]:
    """For each multiple-choice answer that was cut off: close its think block and read the letter from the logits.

    One forward pass over prompt, unfinished answer, `</think>` where it is missing, and "The answer is" (budget
    forcing, as in m1, arXiv 2504.00869). Writes `path` (JSONL) and returns its rows: id, key (of the answer and its text),
    letter, and logprobs (nats over the whole vocabulary, by letter).
    """
    options = {} if items is None else dict(zip(items["id"].astype(str), items["options"], strict=True))
    prompts = {question.id: question.prompt for question in questions}
    cut_off = [a for a in answers if a["kind"] == "choice" and needs_forcing(a, options[a["id"]])]
    known = {(row["id"], row["key"]): row for row in read_lines(path)}
    keys = {a["id"]: forced_key(a) for a in cut_off}
    rows = []
    for answer in track(cut_off, "forcing answers", unit="answer") if cut_off else ():
        row = known.get((answer["id"], keys[answer["id"]]))
        if row is None:
            text = prompts[answer["id"]] + answer["text"] + ("" if CLOSE in answer["text"] else f"\n{CLOSE}")
            logprobs = letter_logprobs(model, tokenizer, f"{text}\n\n{CUE}", options[answer["id"]])
            letter = max(logprobs, key=logprobs.get)
            row = {"id": answer["id"], "key": keys[answer["id"]], "letter": letter, "logprobs": logprobs}
        rows.append(row)
    write_text(path, to_lines(rows))
    return rows


def letter_logprobs(model, tokenizer, text: str, letters: Mapping[str, str] | Sequence[str]) -> dict[str, float]:
    """log p(" X" | text) in nats for each letter X, from the logits of one forward pass over `text`.

    Raises OutOfMemory where that does not fit into memory.
    """
    import torch

    shared, tokens = _letter_tokens(tokenizer, letters)
    ids = tokenizer(text)["input_ids"] + shared
    try:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            "A single unfinished answer does not fit into memory; lower generate.max_new_tokens."
        ) from None
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return {letter: float(logprobs[token]) for letter, token in tokens.items()}


def _letter_tokens(tokenizer, letters) -> tuple[list[int], dict[str, int]]:
    """What all letters share after a space (nothing in large vocabularies, the space itself in small ones), and the
    one token that tells them apart."""
    encoded = {letter: tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in letters}
    shortest = min(encoded.values(), key=len)
    shared = 0
    while shared < len(shortest) - 1 and len({ids[shared] for ids in encoded.values()}) == 1:
        shared += 1
    tokens = {letter: ids[shared] for letter, ids in encoded.items()}
    if len(set(tokens.values())) < len(tokens):
        raise ModelError(f"The tokenizer does not tell the letters {', '.join(letters)} apart by one token each.")
    return shortest[:shared], tokens
