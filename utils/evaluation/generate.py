"""Answers from a loaded model: batched, resumable answer by answer, on every GPU, and the same for both arms."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from utils.errors import OutOfMemory
from utils.evaluation.answer_parsing import CLOSE
from utils.evaluation.questions import Question, answer_key, matching_answers
from utils.evaluation.sampling import question_stream, sampling_processors
from utils.files import write_text
from utils.models.decoding import forget_cache
from utils.models.memory import free_memory, is_out_of_memory, sequences_that_fit
from utils.progress import Progress
from utils.schema import GenerateSection
from utils.sealed import split_lines, to_lines

ROUND_TOKENS = 256  # a batch is reshuffled after so many new tokens: who has finished leaves, others take the place


class Helpers(Protocol):
    """Other processes that answer a share of the questions (see `workers`)."""

    def start(self, questions: Sequence[Question]) -> Sequence[Question]:
        """Give shares away and return what is left to do here."""

    def wait(self) -> None:
        """Until the others have written their answers beside ours, or have ended."""


@dataclass
class Pending:
    """A question on its way: the prompt's token ids, and those generated so far."""

    question: Question
    prompt: list[int]
    generated: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)


def answer_questions(
    model,
    tokenizer,
    questions: Sequence[Question],
    config: GenerateSection,
    path: Path,
    arm: str,
    helpers: Helpers | None = None,
) -> list[dict]:
    """Answer every question and append each answer to `path` (JSONL) as soon as it is complete.

    An answer on file to the same prompt, by the same `arm` and decoding, is not generated again. `helpers` take over
    shares; what they leave undone is done here. Returns the answers in the order of the questions: dicts of id, kind,
    key, text, tokens (completion tokens, the end token counted), reasoning_tokens (those up to and with `</think>`, or
    all of them) and finish_reason (`stop`, or `length` at max_new_tokens).

    Raises OutOfMemory where even a single question does not fit into memory.
    """
    keys = {q.id: answer_key(q, config, arm) for q in questions}
    path.parent.mkdir(parents=True, exist_ok=True)
    _set_aside_torn_lines(path)
    while missing := _unanswered(path, questions, keys):
        mine = helpers.start(missing) if helpers else missing
        engine = _Engine(model, tokenizer, config, keys, path)
        engine.run(mine, already=len(questions) - len(missing), total=len(questions) - len(missing) + len(mine))
        if helpers:
            helpers.wait()
            helpers = None  # a second pass, if there is one, is ours alone
    answers = matching_answers(path, keys)
    return [answers[q.id] for q in questions]


def share_path(path: Path, number: int) -> Path:
    """Where helper `number` writes its answers until they are joined with those in `path`."""
    return path.with_suffix(f".{number}.jsonl")


def _unanswered(path: Path, questions: Sequence[Question], keys: dict[str, str]) -> list[Question]:
    _absorb(path)
    done = matching_answers(path, keys)
    return [q for q in questions if q.id not in done]


def _absorb(path: Path) -> None:
    """Join the helpers' answers with ours, those of an interrupted run included."""
    for share in sorted(path.parent.glob(f"{path.stem}.[0-9]*.jsonl")):
        whole, others = split_lines(share.read_bytes())
        _keep(path, others)
        _append(path, to_lines(whole).encode())
        share.unlink()


def _append(path: Path, lines: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(lines)
        stream.flush()
        os.fsync(stream.fileno())


def _set_aside_torn_lines(path: Path) -> None:
    """A kill in the middle of a write leaves a line without its end, to which nothing must be glued; a damaged one, or one
    from before lines had seals, goes too. All are kept beside: who deems them good can still read them."""
    data = path.read_bytes() if path.exists() else b""
    whole, others = split_lines(data)
    if others:
        kept = _keep(path, others)
        print(
            f"{path.name} holds {len(whole)} whole answers; the other {len(others)} lines are kept in {kept.name}, "
            "and their questions answered again"
        )
    if others or (data and not data.endswith(b"\n")):
        write_text(path, to_lines(whole))


def _keep(path: Path, lines: Sequence[bytes]) -> Path:
    """Add lines that are no answers to those kept beside `path`; returns where."""
    kept = path.with_name(f"{path.name}.old")
    if lines:
        _append(kept, b"".join(line + b"\n" for line in lines))
    return kept


class _Engine:
    """One process's loop: batches as large as memory allows, in rounds of ROUND_TOKENS.

    After a round the finished answers are on file and their places are taken by others, so that no answer waits for
    the longest one; what goes on is prefilled again, which costs far less than decoding it did.
    """

    def __init__(self, model, tokenizer, config: GenerateSection, keys: dict[str, str], path: Path):
        self.model, self.tokenizer, self.config, self.keys, self.path = model, tokenizer, config, keys, path
        self.share = 1.0  # of what should fit or was asked for; halved whenever it did not
        self.tokens = 0

    def run(self, questions: Sequence[Question], already: int, total: int) -> None:
        """Answer `questions`; `already` and `total` are for the progress bar."""
        pending = [Pending(q, self.tokenizer(q.prompt)["input_ids"]) for q in questions]
        started = time.monotonic()
        with Progress("answering", total, "question") as bar:
            bar.update(already)
            while pending:
                batch, steps = self._choose(pending)
                outputs = self._try_generate(batch, steps)
                if outputs is None:
                    continue
                finished = self._finish(batch, outputs)
                _append(self.path, to_lines(finished).encode())
                gone = {answer["id"] for answer in finished}
                pending = [p for p in pending if p.question.id not in gone]
                speed = self.tokens / (time.monotonic() - started)
                bar.update(len(finished), f"{speed:,.0f} tokens/s, {len(batch)} at once")
        forget_cache(self.model)

    def _choose(self, pending: list[Pending]) -> tuple[list[Pending], int]:
        """The next batch and how many tokens to add: rows of one round, longest prompt first.

        The furthest round that can fill a whole batch goes first, so that answers come to an end; while none can,
        the earliest does, which fills the later ones.
        """
        rounds: dict[int, list[Pending]] = {}
        for one in sorted(pending, key=lambda p: (-p.length, p.question.id)):
            rounds.setdefault(len(one.generated) // ROUND_TOKENS, []).append(one)
        for number in sorted(rounds, reverse=True):
            rows = rounds[number]
            steps = min(ROUND_TOKENS, self.config.max_new_tokens - len(rows[0].generated))
            size = self._size(rows[0].length, steps)
            if len(rows) >= size or number == min(rounds):
                break
        return rows[:size], steps

    def _size(self, prompt_tokens: int, steps: int) -> int:
        size = self.config.batch_size
        if size == "auto":
            size = sequences_that_fit(self.model, prompt_tokens, steps)
        return max(1, int(size * self.share))

    def _try_generate(self, batch: list[Pending], steps: int) -> list[list[int]] | None:
        """New token ids of each row, or None after running out of memory, with the next batch halved."""
        try:
            outputs = generate_batch(self.model, self.tokenizer, batch, steps, self.config)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            outputs = None
        if outputs is None:  # outside the handler, whose traceback would keep the tensors alive
            if len(batch) == 1:
                raise OutOfMemory("A single question does not fit into memory; lower generate.max_new_tokens.")
            self.share /= 2
            free_memory(self.model)
        return outputs

    def _finish(self, batch: list[Pending], outputs: list[list[int]]) -> list[dict]:
        """Extend the pending answers and return those that are complete."""
        eos, finished = self.tokenizer.eos_token_id, []
        for one, ids in zip(batch, outputs, strict=True):
            stopped = eos in ids
            ids = ids[: ids.index(eos)] if stopped else ids
            one.generated += ids
            self.tokens += len(ids) + stopped
            if stopped or len(one.generated) >= self.config.max_new_tokens:
                finished.append(self._answer(one, stopped))
        return finished

    def _answer(self, one: Pending, stopped: bool) -> dict:
        close = self.tokenizer.convert_tokens_to_ids(CLOSE)
        ids = one.generated
        return {
            "id": one.question.id,
            "kind": one.question.kind,
            "key": self.keys[one.question.id],
            "text": self.tokenizer.decode(ids, skip_special_tokens=False),
            "tokens": len(ids) + stopped,
            "reasoning_tokens": ids.index(close) + 1 if close in ids else len(ids),
            "finish_reason": "stop" if stopped else "length",
        }


def generate_batch(model, tokenizer, batch: Sequence[Pending], steps: int, config: GenerateSection) -> list[list[int]]:
    """Up to `steps` new token ids for each row, padding after the end token included.

    Padding is put on the left by hand: unsloth's generate turns the tokenizer's padding_side to the right (issue 3283).
    """
    import torch

    width = max(one.length for one in batch)
    ids = torch.full((len(batch), width), tokenizer.pad_token_id)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for i, one in enumerate(batch):
        ids[i, width - one.length :] = torch.tensor(one.prompt + one.generated)
        mask[i, width - one.length :] = 1
    streams = [
        question_stream(config.seed, one.question.id, len(one.generated) + steps)[len(one.generated) :] for one in batch
    ]
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=steps,
            do_sample=False,  # what is drawn is drawn by the processors
            logits_processor=sampling_processors(config, streams, width, model.device),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return output[:, width:].tolist()
