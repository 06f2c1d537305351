"""Sampling that depends on the question and not on its neighbours in the batch.

`generate` draws from one stream of random numbers for the whole batch: another batch size, an interruption or a second
GPU would give other answers. Here every question has its own stream, and both arms draw from the same one, which also
takes noise out of the paired comparison (common random numbers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from utils.schema import GenerateSection


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
