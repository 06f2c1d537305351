"""What a loaded model finds likely: each held-out row's completion, and the letters of multiple-choice options."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from utils.data.rows import read_table
from utils.errors import ModelError
from utils.evaluation.answer_parsing import CLOSE
from utils.evaluation.generate import fit_or_none, last_logits
from utils.evaluation.questions import Question, find_letterless, matching_rows, require_rows
from utils.files import append_lines, digest_of
from utils.models.prompt_format import tokenize_row
from utils.pipeline.run_dir import RunDir
from utils.progress import Progress, track

CUE = "The answer is"  # what an answer without a letter goes on with, before its letter is read
_BATCH_TOKENS = 2048  # in one forward pass; logits over 128k entries bound it
_SAME_BASE = 0.02
_ROW_TOO_LARGE = "A single held-out row does not fit into memory; lower model.max_seq_length."
_ANSWER_TOO_LARGE = "An answer does not fit into memory to be asked for its letter; lower generate.max_new_tokens."


def completion_loss(model, tokenizer, rows: pd.DataFrame, max_length: int) -> pd.DataFrame:
    """Negative log-likelihood (nats) of each row's completion given its prompt, reasoning and response apart.

    `rows` has id, prompt and completion; those longer than `max_length` tokens are left out, never cut. Returns id and
    sums over tokens. Raises OutOfMemory where a single row does not fit.
    """
    encoded = {row.id: tokenize_row(tokenizer, row.prompt, row.completion) for row in rows.itertuples()}
    lengths = {name: len(row["input_ids"]) for name, row in encoded.items()}
    waiting = sorted((name for name in encoded if lengths[name] <= max_length), key=lengths.get)
    sums, limit = {}, _BATCH_TOKENS
    with Progress("scoring held-out rows", len(waiting), "row") as bar:
        while waiting:
            # As many of the shortest as fit, each padded to the longest of them.
            count = max(n for n, name in enumerate(waiting, start=1) if n == 1 or n * lengths[name] <= limit)
            batch = [encoded[name] for name in waiting[:count]]
            found = fit_or_none(_ROW_TOO_LARGE, count, _loss_of_batch, model, tokenizer, batch)
            if found is None:
                limit //= 2
                continue
            sums.update(zip(waiting[:count], found, strict=True))
            waiting = waiting[count:]
            bar.update(count)
    types = {"reasoning_nll": float, "reasoning_tokens": int, "response_nll": float, "response_tokens": int}
    table = [[name, *sums[name]] for name in encoded if name in sums]
    return pd.DataFrame(table, columns=["id", *types]).astype(types)


def _loss_of_batch(model, tokenizer, batch: list[dict]) -> list[list]:
    """Loss and tokens of each row's reasoning and response; padded on the right, which nothing looks at."""
    import torch

    rows = [torch.tensor(row["input_ids"]) for row in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    with torch.inference_mode():
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    sums = []
    for i, row in enumerate(batch):
        target = rows[i][1:].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits[i, : len(target)].float(), target, reduction="none").cpu()
        parts = [loss[torch.tensor(row["part"][1:]) == code].double() for code in (1, 2)]
        sums.append([value for part in parts for value in (float(part.sum()), len(part))])
    return sums


def check_same_base(model, tokenizer, rows: pd.DataFrame, baseline: pd.DataFrame, count: int = 8) -> float:
    """The largest relative deviation of `count` rows' loss, adapter off, from 01's; ModelError above 2 %."""
    chosen = rows[rows["id"].isin(baseline["id"])].head(count)
    with model.disable_adapter():
        now = completion_loss(model, tokenizer, chosen, max_length=10**9)
    after, before = (one.set_index("id")[["reasoning_nll", "response_nll"]].sum(axis=1) for one in (now, baseline))
    worst = float((after / before[after.index] - 1).abs().max()) if len(after) else 0.0
    if worst > _SAME_BASE:
        found = f"With the adapter switched off the loss differs by {worst:.1%} from the baseline's"
        raise ModelError(f"{found}; it is not the base model that answered in 01: delete baseline/, and run 01 again.")
    return worst


def forced_letters(
    model, tokenizer, questions: Sequence[Question], answers: Sequence[dict], items: pd.DataFrame | None, path: Path
) -> None:
    """Append to `path` the letter that the logits say for each choice that states no option, finished or not.

    After prompt, answer, `</think>` where it is missing, and CUE (budget forcing, as in m1, arXiv 2504.00869).
    """
    given, prompts, asked = {a["id"]: a for a in answers}, {q.id: q.prompt for q in questions}, []
    for identifier, (key, options) in find_letterless(given, items).items():
        text = given[identifier]["text"]
        closing = "" if CLOSE in text else f"\n{CLOSE}"
        asked.append((identifier, key, f"{prompts[identifier]}{text}{closing}\n\n{CUE}", options))
    _append_letters(model, tokenizer, asked, path, "asking for letters")


def measure_letters(model, tokenizer, items: pd.DataFrame, path: Path, digest: str) -> pd.DataFrame:
    """Append to `path` the letter that the logits say right after each question, as lm-eval's medqa_4options does."""
    prompts = [format_letter_prompt(item.question, item.options) for item in items.itertuples()]
    keys = _letter_keys(items, digest)
    asked = list(zip(keys, keys.values(), prompts, items["options"], strict=True))
    _append_letters(model, tokenizer, asked, path, "reading letters")
    return read_letters(items, path, digest)


def _append_letters(model, tokenizer, asked: Sequence[tuple[str, str, str, Mapping]], path: Path, what: str) -> None:
    """Append the likeliest letter after each text to `path`, one by one; `asked` holds (id, key, text, letters)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_lines(path, [])  # a stage's output is there, if empty
    known = matching_rows(path, {identifier: key for identifier, key, *_ in asked})
    missing = [one for one in asked if one[0] not in known]
    for identifier, key, text, letters in track(missing, what, unit="item") if missing else ():
        logprobs = letter_logprobs(model, tokenizer, text, letters)
        letter = max(logprobs, key=logprobs.get)
        append_lines(path, [{"id": identifier, "key": key, "letter": letter, "logprobs": logprobs}])


def letter_logprobs(model, tokenizer, text: str, letters: Iterable[str]) -> dict[str, float]:
    """log p(" X" | text) in nats for each letter X; raises OutOfMemory, and ModelError where a value is not finite."""
    import torch

    ids = tokenizer(text)["input_ids"]
    encoded = {letter: tokenizer.encode(f" {letter}", add_special_tokens=False) for letter in letters}
    after = {}  # {all tokens of a letter but its last: log-probabilities from the end of the text on}
    for start in {tuple(tokens[:-1]) for tokens in encoded.values()}:
        logits = fit_or_none(_ANSWER_TOO_LARGE, 1, last_logits, model, [*ids, *start], len(start) + 1)
        after[start] = torch.log_softmax(logits, dim=-1)
    found = {
        letter: sum(float(after[tuple(tokens[:-1])][i, token]) for i, token in enumerate(tokens))
        for letter, tokens in encoded.items()
    }
    if not all(map(math.isfinite, found.values())):
        raise ModelError(f"The letters' log-probabilities are {[*found.values()]}; try another hardware.dtype.")
    return found


def load_letter_items(run: RunDir) -> pd.DataFrame:
    """All items of the first benchmark, as 00 froze them where evaluate.letter_logprobs is on."""
    return read_table(run.file("data/probe_items.jsonl"), "evaluate.letter_logprobs", ("question", "options"))


def format_letter_prompt(question: str, options: Mapping[str, str]) -> str:
    """The prompt of lm-eval's task medqa_4options, letter for letter, for any number of options."""
    lines = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return f"Question: {question}\n{lines}Answer:"


def read_letters(items: pd.DataFrame, path: Path, digest: str) -> pd.DataFrame:
    """What `measure_letters` wrote, in the order of `items`, with `correct` and `group`; RunDirError unless every item is there."""
    keys = _letter_keys(items, digest)
    rows = require_rows(path, keys, "letters, with evaluate.letter_logprobs on")
    found = pd.DataFrame([rows[identifier] for identifier in keys])
    groups = items.get("group", items["id"])  # a run that began earlier may have none
    return found.assign(correct=found["letter"] == items["gold"].to_numpy(), group=list(groups))


def _letter_keys(items: pd.DataFrame, digest: str) -> dict[str, str]:
    """{id: a digest of model, prompt and right letter}."""
    return {
        str(item.id): digest_of([digest, format_letter_prompt(item.question, item.options), item.gold])
        for item in items.itertuples()
    }
