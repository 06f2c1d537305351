"""Answers from a loaded model: batched, resumable answer by answer, on every GPU, and the same for both models.

`generate` would draw from one stream of random numbers for the whole batch: another batch size, an interruption or a
second GPU would give other answers. Here every question has a stream of its own, and both models draw from the same one,
which also takes noise out of the paired comparison (common random numbers).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.errors import ModelError, OutOfMemory
from utils.evaluation.questions import Question, answer_key, matching_answers
from utils.files import append_lines, read_lines
from utils.models.memory import free_memory, is_out_of_memory, sequences_that_fit
from utils.models.prompt_format import count_reasoning
from utils.models.unsloth_patches import forget_cache
from utils.progress import Progress
from utils.schema import GenerateSection

ROUND_TOKENS = 256  # a batch is reshuffled after so many new tokens: who has finished leaves, others take the place
_TIE = 0.1  # in standard deviations of the logits: rounding decides between tokens that are nearer to each other


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
    model, tokenizer, questions: Sequence[Question], config: GenerateSection, path: Path, digest: str, helpers=None
) -> list[dict]:
    """Answer every question and append each answer to `path` (JSONL) as soon as it is complete.

    An answer on file to the same prompt, by the same model (its `digest`) and decoding, is not generated again.
    `helpers` (`workers.Workers`) take over shares; what they leave undone is done here. Returns the answers in the order of the questions:
    dicts of id, kind, key, text, tokens (completion tokens, the end token counted), reasoning_tokens (those up to and
    with `</think>`, or all of them) and finish_reason (`stop`, or `length` at max_new_tokens).

    Raises OutOfMemory where even a single question does not fit.
    """
    keys = {q.id: answer_key(q, config, digest) for q in questions}
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """What is still to be answered, after the helpers' answers (those of an interrupted run too) were joined with ours."""
    for share in sorted(path.parent.glob(f"{path.stem}.[0-9]*.jsonl")):
        append_lines(path, read_lines(share))
        share.unlink()
    done = matching_answers(path, keys)
    return [q for q in questions if q.id not in done]


class _Engine:
    """One process's loop: batches as large as memory allows, in rounds of ROUND_TOKENS.

    After a round the finished answers are on file and their places are taken by others, so that no answer waits for
    the longest one; the rest is prefilled again, which costs far less than decoding it did.
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
                append_lines(self.path, finished)
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
            return generate_batch(self.model, self.tokenizer, batch, steps, self.config)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, whose traceback would keep the tensors alive.
        if len(batch) == 1:
            raise OutOfMemory("A single question does not fit into memory; lower generate.max_new_tokens.")
        self.share /= 2
        free_memory(self.model)
        return None

    def _finish(self, batch: list[Pending], outputs: list[list[int]]) -> list[dict]:
        """Extend the pending answers and return those that are complete."""
        finished = []
        for one, ids in zip(batch, outputs, strict=True):
            ids, stopped = _cut_at_end(ids, self.tokenizer)
            one.generated += ids
            self.tokens += len(ids) + stopped
            if stopped or len(one.generated) >= self.config.max_new_tokens:
                finished.append(self._answer(one, stopped))
        return finished

    def _answer(self, one: Pending, stopped: bool) -> dict:
        ids = one.generated
        return {
            "id": one.question.id,
            "kind": one.question.kind,
            "key": self.keys[one.question.id],
            "text": self.tokenizer.decode(ids, skip_special_tokens=False),
            "tokens": len(ids) + stopped,
            "reasoning_tokens": count_reasoning(self.tokenizer, ids),
            "finish_reason": "stop" if stopped else "length",
        }


def _cut_at_end(ids: list[int], tokenizer) -> tuple[list[int], bool]:
    """The ids before the end token, and whether there was one."""
    stopped = tokenizer.eos_token_id in ids
    return (ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids), stopped


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
    streams = []
    for one in batch:
        done = len(one.generated)
        streams.append(question_stream(config.seed, one.question.id, done + steps)[done:])
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


def question_stream(seed: int, question_id: str, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for a question, one for each token of its answer (Philox, counter-based)."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{question_id}".encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def sampling_processors(config: GenerateSection, streams: Sequence[np.ndarray], start: int, device):
    """Logits processors for `generate(do_sample=False)`: temperature, top-p, then each row's own draw.

    `streams` holds for each row the numbers of the tokens to come; `start` is the padded prompt's length. An empty
    list where the decoding is greedy.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    processors = LogitsProcessorList()
    if config.do_sample:
        if config.temperature != 1:
            processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_p < 1:
            processors.append(TopPLogitsWarper(config.top_p))
        processors.append(_draw_by_stream(streams, start, device))
    return processors


def _draw_by_stream(streams: Sequence[np.ndarray], start: int, device):
    """A logits processor that leaves one token a row: the inverse of the distribution function at the row's number."""
    import torch
    from transformers import LogitsProcessor

    numbers = torch.tensor(np.stack(streams), dtype=torch.float64, device=device)

    class DrawByStream(LogitsProcessor):
        def __call__(self, input_ids, scores):
            step = input_ids.shape[1] - start
            cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
            total = cumulative[:, -1:]
            # Below the total and right of a border: the chosen token never has probability zero.
            target = torch.minimum(numbers[:, step : step + 1] * total, torch.nextafter(total, torch.zeros_like(total)))
            chosen = torch.searchsorted(cumulative, target, right=True)
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    return DrawByStream()


def check_batching(model, tokenizer, questions: Sequence[Question], count: int = 4, tokens: int = 32) -> dict:
    """Answer `count` prompts of different lengths greedily, in one batch and one by one, and compare `tokens` tokens.

    unsloth's batched generate ignored padding for months (issues 1066, 3699; pull request 4100). Where the two part,
    both tokens must be as likely as rounding can make them. Returns the numbers of `prompts`, of `identical` ones, and
    of `near_ties`. Raises ModelError where the batch says something else.
    """
    ordered = sorted(questions, key=lambda q: len(q.prompt))
    count = min(count, len(ordered))
    chosen = [ordered[i * (len(ordered) - 1) // max(1, count - 1)] for i in range(count)]
    greedy = GenerateSection(do_sample=False, max_new_tokens=tokens)
    rows = [Pending(q, tokenizer(q.prompt)["input_ids"]) for q in chosen]
    batched = generate_batch(model, tokenizer, rows, tokens, greedy) if rows else []
    near_ties = 0
    for row, together in zip(rows, batched, strict=True):
        (alone,) = generate_batch(model, tokenizer, [row], tokens, greedy)
        near_ties += _part_at_tie(model, row, _with_end(together, tokenizer), _with_end(alone, tokenizer))
    return {"prompts": count, "identical": count - near_ties, "near_ties": near_ties}


def _with_end(ids: list[int], tokenizer) -> list[int]:
    kept, stopped = _cut_at_end(ids, tokenizer)
    return [*kept, tokenizer.eos_token_id] if stopped else kept


def _part_at_tie(model, row: Pending, together: list[int], alone: list[int]) -> bool:
    """Whether the two part at a near tie; False where they are the same. Raises ModelError otherwise."""
    if together == alone:
        return False
    place = next((i for i, pair in enumerate(zip(together, alone, strict=False)) if pair[0] != pair[1]), None)
    if place is None:  # one is the other's beginning: impossible unless the end token was lost
        place, how = min(len(together), len(alone)), "ends elsewhere"
    else:
        logits = _next_logits(model, row.prompt + alone[:place])
        gap = float(logits[alone[place]] - logits[together[place]]) / max(float(logits.std()), 1e-9)
        if gap <= _TIE:
            return True
        how = f"{gap:.2f} standard deviations of the logits apart"
    raise ModelError(
        f"In a batch the model answers the question {row.question.id} otherwise than alone, from token {place + 1} on "
        f"({how}); padding is handled wrongly here: set hardware.backend=transformers, or generate.batch_size=1."
    )


def _next_logits(model, ids: list[int]):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()
