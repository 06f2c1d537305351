"""Answers from a loaded model: batched, resumable answer by answer, on every GPU, and the same for both models.

`generate` would draw from one stream of random numbers for the whole batch, and another batch size would give other
answers. Here every question has its own stream, the same for both models (common random numbers: less noise in the pairs).
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.errors import ModelError, OutOfMemory, SessionOver
from utils.evaluation.questions import Question, answer_key, matching_rows
from utils.files import append_lines, read_lines
from utils.models.memory import free_memory, is_out_of_memory, sequences_that_fit
from utils.models.prompt_format import count_reasoning
from utils.models.unsloth_patches import forget_cache
from utils.pipeline.time_limit import Deadline
from utils.progress import Progress
from utils.schema import GenerateSection

ROUND_TOKENS = 384  # a batch is reshuffled after so many new tokens: who has finished leaves, others take the place
_TOO_LARGE = "A single question does not fit into memory; lower generate.max_new_tokens."
_SMALLER = 0.8  # a batch out of memory costs a prompt's forward pass; far fewer rows than fit cost far more
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
    model, tokenizer, questions, config: GenerateSection, path: Path, digest, helpers=None, max_hours=None, ahead=""
) -> list[dict]:
    """Answer every question, append each answer to `path` (JSONL) as soon as it is complete, and return all in order.

    An answer on file to the same prompt, by the same model (its `digest`) and decoding, is not generated again.
    `helpers` (`workers.Workers`) take over shares; what they leave undone is done here. A forecast ends in `ahead`.
    `tokens` counts the end token, `reasoning_tokens` go up to and with `</think>`. Raises OutOfMemory where even a single
    question does not fit, and SessionOver, between two batches, where the session would pass `max_hours`.
    """
    keys = {q.id: answer_key(q, config, digest) for q in questions}
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        for share in sorted(path.parent.glob(f"{path.stem}.[0-9]*.jsonl")):  # of an interrupted run too
            append_lines(path, read_lines(share))
            share.unlink()
        answers = matching_rows(path, keys)
        missing = [q for q in questions if q.id not in answers]
        if not missing:
            return [answers[q.id] for q in questions]
        mine = helpers.start(missing) if helpers else missing
        _generate(model, tokenizer, mine, config, keys, path, Deadline.of(max_hours), ahead)
        if helpers:
            helpers.wait()
            helpers = None  # a second pass, if there is one, is ours alone


def share_path(path: Path, number: int) -> Path:
    """Where helper `number` writes its answers until they are joined with those in `path`."""
    return path.with_suffix(f".{number}.jsonl")


def _generate(model, tokenizer, questions: Sequence[Question], config, keys, path, deadline: Deadline, ahead) -> None:
    """One process's loop, in rounds of ROUND_TOKENS: others take the places of finished answers, so that none waits for
    the longest; the rest is prefilled again, which costs far less than decoding it did.
    """
    pending, end = [Pending(q, tokenizer(q.prompt)["input_ids"]) for q in questions], tokenizer.eos_token_id
    tokens, started = 0, time.monotonic()
    shares: dict[int, float] = {}  # of what should fit, by round: less in the one where it did not
    longest, ended = 0.0, 0  # seconds of a round; answers that came to their end before the limit
    with Progress("answering", len(pending), "question") as bar:
        while pending:
            if longest and deadline.is_due(next_s=longest):  # each session gets one batch further
                waiting = f"{len(pending)} of {len(questions)} questions wait for their answers"
                again = "run this notebook again in the next session, it resumes there"
                raise SessionOver(f"{waiting}, because {deadline.sentence()}; {again}.")
            began = time.monotonic()
            batch, steps, fit = _choose_batch(model, pending, config, shares)
            outputs = fit_or_none(_TOO_LARGE, len(batch), generate_batch, model, tokenizer, batch, steps, config)
            if outputs is None:
                shares[_round_of(batch[0])] = _SMALLER * len(batch) / fit
                continue
            finished = {}
            for one, output in zip(batch, outputs, strict=True):
                ids = output[: output.index(end) + 1] if end in output else output
                stopped = ids[-1] == end
                one.generated += ids[:-1] if stopped else ids
                tokens, ended = tokens + len(ids), ended + stopped
                if stopped or len(one.generated) >= config.max_new_tokens:
                    finished[one.question.id] = {
                        "id": one.question.id,
                        "kind": one.question.kind,
                        "key": keys[one.question.id],
                        "text": tokenizer.decode(one.generated, skip_special_tokens=False),
                        "tokens": len(one.generated) + stopped,
                        "reasoning_tokens": count_reasoning(tokenizer, one.generated),
                        "finish_reason": "stop" if stopped else "length",
                    }
            append_lines(path, finished.values())
            pending = [one for one in pending if one.question.id not in finished]
            longest = max(longest, time.monotonic() - began)
            speed = tokens / (time.monotonic() - started)
            bar.update(len(finished), f"{speed:,.0f} tokens/s, {len(batch)} at once")
            each = expected_tokens(tokens, ended, config.max_new_tokens)
            by = f"{speed:,.0f} tokens/s so far, some {each:,.0f} tokens an answer by {ended} that have ended"
            bar.forecast((len(questions) * each - tokens) / speed, f"these answers ({by}).{ahead}")
    forget_cache(model)


def expected_tokens(tokens: int, ended: int, limit: int) -> float:
    """Mean tokens of an answer, where `tokens` were written and so many answers `ended` before the limit: all are taken
    to end at the rate of those so far (maximum likelihood of an exponential, of which most are censored).
    """
    return tokens / ended * (1 - math.exp(-limit * ended / tokens)) if ended else limit


def _round_of(one: Pending) -> int:
    return len(one.generated) // ROUND_TOKENS


def _choose_batch(model, pending: list[Pending], config, shares: dict) -> tuple[list[Pending], int, int]:
    """The next batch, how many tokens to add, and how many rows should fit. A batch is of one round, longest prompt first: of the
    furthest that fills it, so that answers come to an end, or else of the earliest, which fills the later ones.
    """
    rounds: dict[int, list[Pending]] = {}
    for one in sorted(pending, key=lambda p: (-p.length, p.question.id)):
        rounds.setdefault(_round_of(one), []).append(one)
    for number, rows in sorted(rounds.items(), reverse=True):
        steps = min(ROUND_TOKENS, config.max_new_tokens - len(rows[0].generated))
        fit = sequences_that_fit(model, rows[0].length, steps) if config.batch_size == "auto" else config.batch_size
        size = max(1, int(fit * shares.get(number, 1.0)))
        if len(rows) >= size:
            break
    return rows[:size], steps, fit


def fit_or_none(sentence: str, size: int, action, model, *arguments):
    """What `action(model, ...)` gives; None where `size` sequences do not fit, OutOfMemory(`sentence`) where one doesn't."""
    try:
        return action(model, *arguments)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if size == 1:  # outside the handler, whose traceback would keep the tensors alive
        raise OutOfMemory(sentence)
    free_memory(model)
    return None


def generate_batch(
    model, tokenizer, batch: Sequence[Pending], steps: int, config: GenerateSection, streamer=None
) -> list[list[int]]:
    """Up to `steps` new token ids for each row; padded by hand, as unsloth pads on the right (issue 3283)."""
    import torch

    forget_cache(model)
    width = max(one.length for one in batch)
    ids = torch.full((len(batch), width), tokenizer.pad_token_id)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    streams = []
    for i, one in enumerate(batch):
        ids[i, width - one.length :] = torch.tensor(one.prompt + one.generated)
        mask[i, width - one.length :] = 1
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
            streamer=streamer,
        )
    return output[:, width:].tolist()


def question_stream(seed: int, question_id: str, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for a question, one for each token of its answer (Philox, counter-based)."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{question_id}".encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def sampling_processors(config: GenerateSection, streams: Sequence[np.ndarray], start: int, device):
    """Temperature, top-p, then each row's own draw from `streams`, its numbers from the token at `start` on."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    if not config.do_sample:
        return LogitsProcessorList()
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

    top_p = [TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
    return LogitsProcessorList([TemperatureLogitsWarper(config.temperature), *top_p, DrawByStream()])


def check_batching(model, tokenizer, questions: Sequence[Question], batch_size="auto", count=4, tokens=32) -> dict:
    """Answer `count` prompts of different lengths greedily, in one batch and one by one: the numbers of `prompts`, of
    `identical` ones, and of `near_ties`, where both tokens are as likely as rounding can make them.

    Raises ModelError elsewhere: unsloth's batched generate ignored padding for months (issues 1066, 3699, 4100).
    """
    ordered = sorted(questions, key=lambda q: len(q.prompt))
    count = 0 if batch_size == 1 else min(count, len(ordered))
    chosen = [ordered[i * (len(ordered) - 1) // max(1, count - 1)] for i in range(count)]
    greedy = GenerateSection(do_sample=False, max_new_tokens=tokens)
    rows = [Pending(q, tokenizer(q.prompt)["input_ids"]) for q in chosen]
    batched = generate_batch(model, tokenizer, rows, tokens, greedy) if rows else []
    near_ties = 0
    for row, together in zip(rows, batched, strict=True):
        (alone,) = generate_batch(model, tokenizer, [row], tokens, greedy)
        differ = (i for i, (one, other) in enumerate(zip(together, alone, strict=False)) if one != other)
        if (place := next(differ, None)) is None:
            continue
        logits = last_logits(model, row.prompt + alone[:place])[0]
        gap = float(logits[alone[place]] - logits[together[place]]) / max(float(logits.std()), 1e-9)
        if gap > _TIE:
            found = f"answers the question {row.question.id} otherwise than alone, from token {place + 1} on"
            instead = "set hardware.backend=transformers or generate.batch_size=1"
            raise ModelError(f"In a batch the model {found}; {instead}.")
        near_ties += 1
    return {"prompts": count, "identical": count - near_ties, "near_ties": near_ties}


def last_logits(model, ids: list[int], count: int = 1):
    """The logits of the next token at the last `count` places of one sequence, as float32 (count, vocabulary)."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -count:].float()
