"""Answers and likelihoods from a loaded model: batched, resumable, and the same for both arms."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from utils.answers import Question, answer_key, read_answers
from utils.errors import HardwareError
from utils.parsing import CLOSE
from utils.progress import Progress
from utils.settings import GenerateSection

_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NLL_TOKENS = 2048  # tokens in one forward pass of `completion_nll`; logits over 128k entries bound it


def answer_questions(
    model, tokenizer, questions: Sequence[Question], config: GenerateSection, path: Path, arm: str
) -> list[dict]:
    """Answer every question and append each answer to `path` (JSONL) as soon as its batch is done.

    An answer on file to the same prompt, by the same `arm` and decoding, is not generated again. A batch that does not fit
    into memory is halved. Returns the answers in the order of the questions: dicts of id, kind, key, text, tokens
    (completion tokens, the end token counted), reasoning_tokens (those up to and with `</think>`, or all of them) and
    finish_reason (`stop`, or `length` at max_new_tokens).

    Raises HardwareError where even a single question does not fit.
    """
    keys = {q.id: answer_key(q, config, arm) for q in questions}
    done = {a["id"]: a for a in read_answers(path) if keys.get(a["id"]) == a["key"]}
    # Longest first: memory trouble shows at once, and a batch holds prompts of about one length.
    waiting = sorted((q for q in questions if q.id not in done), key=lambda q: (-len(q.prompt), q.id))
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_torn_line(path)
    size = config.batch_size
    with Progress("answering", len(questions), "question") as bar:
        bar.update(len(questions) - len(waiting))
        while waiting:
            batch = waiting[:size]
            try:
                answers = _generate(model, tokenizer, batch, config)
            except RuntimeError as error:
                if not any(sign in str(error) for sign in _NO_MEMORY):
                    raise
                answers = None
            if answers is None:  # outside the handler, whose traceback would keep the tensors alive
                if len(batch) == 1:
                    raise HardwareError("A single question does not fit into memory; lower generate.max_new_tokens.")
                size = len(batch) // 2
                _empty_cache()
                continue
            with path.open("a", encoding="utf-8") as stream:
                for answer in answers:
                    answer["key"] = keys[answer["id"]]
                    done[answer["id"]] = answer
                    stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            waiting = waiting[len(batch) :]
            bar.update(len(batch))
    return [done[q.id] for q in questions]


def _end_torn_line(path: Path) -> None:
    """A kill in the middle of a write leaves a line without its end; what is appended must not be glued to it."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as stream:
            stream.write("\n")


def _generate(model, tokenizer, batch: Sequence[Question], config: GenerateSection) -> list[dict]:
    import torch

    # unsloth's generate turns padding_side to the right (unsloth issue 3283): set it before every batch.
    tokenizer.padding_side = "left"
    inputs = tokenizer([q.prompt for q in batch], return_tensors="pt", padding=True).to(model.device)
    # transformers fills in top_k=50 unless told otherwise; what was registered is temperature and top_p.
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.do_sample else {}
    torch.manual_seed(config.seed + int(answer_key(batch[0], config, "")[:8], 16) % 2**31)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=config.max_new_tokens,
            do_sample=config.do_sample,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    close = tokenizer.convert_tokens_to_ids(CLOSE)
    answers = []
    for question, ids in zip(batch, output[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
        stopped = tokenizer.eos_token_id in ids
        ids = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
        answers.append(
            {
                "id": question.id,
                "kind": question.kind,
                "text": tokenizer.decode(ids, skip_special_tokens=False),
                "tokens": len(ids) + stopped,
                "reasoning_tokens": ids.index(close) + 1 if close in ids else len(ids),
                "finish_reason": "stop" if stopped else "length",
            }
        )
    return answers


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
    """
    import torch

    encoded = [tokenize_row(tokenizer, row.prompt, row.completion) for row in rows.itertuples()]
    fitting = [i for i, row in enumerate(encoded) if len(row["input_ids"]) <= max_length]
    fitting.sort(key=lambda i: len(encoded[i]["input_ids"]))
    results: dict[int, dict] = {}
    with Progress("scoring held-out rows", len(fitting), "row") as bar, torch.inference_mode():
        while len(results) < len(fitting):
            batch = fitting[len(results) :]
            longest, count = 0, 0
            for i in batch:
                longest = max(longest, len(encoded[i]["input_ids"]))
                if count and longest * (count + 1) > _NLL_TOKENS:
                    break
                count += 1
            batch = batch[:count]
            for i, sums in zip(batch, _nll_of_batch(model, tokenizer, [encoded[i] for i in batch]), strict=True):
                results[i] = {"id": rows["id"].iloc[i], **sums}
            bar.update(count)
    types = {"reasoning_nll": float, "reasoning_tokens": int, "response_nll": float, "response_tokens": int}
    return pd.DataFrame([results[i] for i in sorted(results)], columns=["id", *types]).astype(types)


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


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
