"""What a loaded model finds likely: each held-out row's completion, and the letters of multiple-choice options."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from utils.data.rows import read_table
from utils.errors import ModelError, OutOfMemory, StageOrderError
from utils.evaluation.answer_parsing import CLOSE
from utils.evaluation.metrics import needs_forcing
from utils.evaluation.questions import Question, forced_key
from utils.files import append_lines, read_lines, write_lines
from utils.models.memory import free_memory, is_out_of_memory
from utils.models.prompt_format import tokenize_row
from utils.pipeline.run_dir import RunDir
from utils.progress import Progress, track

CUE = "The answer is"  # what a cut-off answer is closed with, before its letter is read
_BATCH_TOKENS = 2048  # in one forward pass; logits over 128k entries bound it
_SAME_BASE = 0.02


def completion_loss(model, tokenizer, rows: pd.DataFrame, max_length: int) -> pd.DataFrame:
    """Negative log-likelihood (nats) of each row's completion given its prompt, reasoning and response apart.

    `rows` has id, prompt and completion. Returns id, reasoning_nll, reasoning_tokens, response_nll, response_tokens,
    sums over tokens. Rows longer than `max_length` tokens are left out, never cut.
    Raises OutOfMemory where a single row does not fit.
    """
    import torch

    encoded = [tokenize_row(tokenizer, row.prompt, row.completion) for row in rows.itertuples()]
    waiting = [i for i, row in enumerate(encoded) if len(row["input_ids"]) <= max_length]
    waiting.sort(key=lambda i: len(encoded[i]["input_ids"]))
    results, limit = {}, _BATCH_TOKENS
    with Progress("scoring held-out rows", len(waiting), "row") as bar, torch.inference_mode():
        while waiting:
            count = _count_within(limit, [len(encoded[i]["input_ids"]) for i in waiting])
            sums = _try(_loss_of_batch, model, tokenizer, [encoded[i] for i in waiting[:count]])
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


def _try(action, *arguments):
    """What `action` gives, or None where the device has no memory left for it."""
    try:
        return action(*arguments)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def _loss_of_batch(model, tokenizer, batch: list[dict]) -> list[dict]:
    """Right-padded and without a mask: causal attention keeps padding from reaching the tokens before it."""
    import torch

    width = max(len(row["input_ids"]) for row in batch)
    ids = torch.full((len(batch), width), tokenizer.pad_token_id)
    for i, row in enumerate(batch):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    sums = []
    for i, row in enumerate(batch):
        target = torch.tensor(row["input_ids"][1:], device=logits.device)
        loss = torch.nn.functional.cross_entropy(logits[i, : len(target)].float(), target, reduction="none").cpu()
        part, values = torch.tensor(row["part"][1:]), {}
        for name, code in (("reasoning", 1), ("response", 2)):
            values[f"{name}_nll"] = float(loss[part == code].double().sum())
            values[f"{name}_tokens"] = int((part == code).sum())
        sums.append(values)
    return sums


def check_same_base(model, tokenizer, rows: pd.DataFrame, baseline: pd.DataFrame, count: int = 8) -> float:
    """The largest relative deviation of the loss on `count` rows, adapter switched off, from what 01 measured.

    Both models must rest on the very same base: another file, quantisation or kernel would be compared as fine-tuning.
    Raises ModelError above 2 % (4-bit in fp16 moves by about a tenth of that from run to run).
    """
    known = baseline.set_index("id")
    chosen = rows[rows["id"].isin(known.index)].head(count)
    with model.disable_adapter():
        now = completion_loss(model, tokenizer, chosen, max_length=10**9).set_index("id")
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

    One forward pass over prompt, unfinished answer, `</think>` where it is missing, and CUE (budget forcing, as in m1,
    arXiv 2504.00869). Writes `path` (JSONL) and returns its rows: id, key (of the answer and its text), letter, and
    logprobs (nats over the whole vocabulary, by letter).
    """
    options = {} if items is None else dict(zip(items["id"].astype(str), items["options"], strict=True))
    prompts = {question.id: question.prompt for question in questions}
    cut_off = [a for a in answers if a["kind"] == "choice" and needs_forcing(a, options[a["id"]])]
    known = {(row["id"], row["key"]): row for row in read_lines(path)}
    rows = []
    for answer in track(cut_off, "forcing answers", unit="answer") if cut_off else ():
        identity = {"id": answer["id"], "key": forced_key(answer)}
        row = known.get((identity["id"], identity["key"]))
        if row is None:
            text = prompts[answer["id"]] + answer["text"] + ("" if CLOSE in answer["text"] else f"\n{CLOSE}")
            logprobs = letter_logprobs(model, tokenizer, f"{text}\n\n{CUE}", options[answer["id"]])
            row = {**identity, "letter": max(logprobs, key=logprobs.get), "logprobs": logprobs}
        rows.append(row)
    write_lines(path, rows)
    return rows


def letter_logprobs(model, tokenizer, text: str, letters: Iterable[str]) -> dict[str, float]:
    """log p(" X" | text) in nats for each letter X; one forward pass, unless letters take several tokens.

    Raises OutOfMemory where that does not fit, ModelError where a value is not finite.
    """
    ids = tokenizer(text)["input_ids"]
    encoded = {letter: tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in letters}
    after = {}  # {all tokens of a letter but its last: log-probabilities from the end of the text on}
    for start in {tuple(tokens[:-1]) for tokens in encoded.values()}:
        after[start] = _try(_last_logprobs, model, [*ids, *start], len(start) + 1)
        if after[start] is None:
            raise OutOfMemory("An unfinished answer does not fit into memory; lower generate.max_new_tokens.")
    found = {
        letter: sum(float(after[tuple(tokens[:-1])][i, token]) for i, token in enumerate(tokens))
        for letter, tokens in encoded.items()
    }
    if not all(map(math.isfinite, found.values())):
        raise ModelError(f"The letters' log-probabilities are {[*found.values()]}; try another hardware.dtype.")
    return found


def _last_logprobs(model, ids: list[int], count: int):
    """Log-probabilities of the next token (nats, over the vocabulary) at the last `count` places."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -count:]
    return torch.log_softmax(logits.float(), dim=-1)


def load_letter_items(run: RunDir) -> pd.DataFrame:
    """All items of the first benchmark, as 00 froze them where evaluate.letter_logprobs is on."""
    return read_table(run.file("data/probe_items.jsonl"), "evaluate.letter_logprobs", ("question", "options"))


def format_letter_prompt(question: str, options: Mapping[str, str]) -> str:
    """The prompt of lm-eval's task medqa_4options, letter for letter, for any number of options."""
    lines = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return f"Question: {question}\n{lines}Answer:"


def measure_letters(model, tokenizer, items: pd.DataFrame, path: Path, digest: str) -> pd.DataFrame:
    """The letters' log-probabilities (nats) right after each question, appended to `path` (JSONL) item by item.

    It measures what a model knows, with no room to reason, as lm-eval's medqa_4options does. `items` has id, question,
    options (dict of letter to text) and gold; what is on file by the same model (its `digest`) is kept. Returns, in
    their order: id, key, letter (the likeliest), correct, logprobs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {row["key"] for row in read_lines(path)}
    missing = [item for item in items.itertuples() if _letter_key(item, digest) not in known]
    for item in track(missing, "reading letters", unit="item") if missing else ():
        prompt = format_letter_prompt(item.question, item.options)
        logprobs = letter_logprobs(model, tokenizer, prompt, item.options)
        letter = max(logprobs, key=logprobs.get)
        row = {"id": str(item.id), "key": _letter_key(item, digest), "letter": letter, "correct": letter == item.gold}
        append_lines(path, [{**row, "logprobs": logprobs}])
    return read_letters(items, path, digest)


def read_letters(items: pd.DataFrame, path: Path, digest: str) -> pd.DataFrame:
    """What `measure_letters` wrote; raises StageOrderError unless every item is there, by this model."""
    known = {row["key"]: row for row in read_lines(path)}
    found = [known.get(_letter_key(item, digest)) for item in items.itertuples()]
    if None in found:
        raise StageOrderError(
            f"{path.parent.name}/{path.name} does not hold all {len(items)} items; run the notebook that writes it "
            "again, with evaluate.letter_logprobs on."
        )
    return pd.DataFrame(found).assign(id=items["id"].astype(str).to_numpy())


def _letter_key(item, digest: str) -> str:
    """A digest of model, prompt and right letter."""
    asked = [digest, format_letter_prompt(item.question, item.options), item.gold]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
