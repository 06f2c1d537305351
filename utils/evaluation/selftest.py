"""Does a batch answer as a single prompt does? Left-padded batches have been wrong before, silently.

unsloth's batched generate ignored padding for months (issues 1066, 3699; pull request 4100). Whoever answers in batches
should look before believing the answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.errors import ModelError
from utils.evaluation.generate import Pending, generate_batch
from utils.evaluation.questions import Question
from utils.schema import GenerateSection

_TIE = 0.1  # in standard deviations of the logits: rounding decides between tokens that are nearer to each other


def check_batch_agrees(model, tokenizer, questions: Sequence[Question], count: int = 4, tokens: int = 32) -> dict:
    """Answer `count` prompts of different lengths greedily, in one batch and one by one, and compare `tokens` tokens.

    Where they part, both tokens must be as likely as rounding can make them. Returns the numbers of `prompts`, of
    `identical` ones, and of `near_ties`. Raises ModelError where the batch says something else.
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
        near_ties += _compare(model, row, _until_end(together, tokenizer), _until_end(alone, tokenizer))
    return {"prompts": count, "identical": count - near_ties, "near_ties": near_ties}


def _until_end(ids: list[int], tokenizer) -> list[int]:
    return ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids


def _compare(model, row: Pending, together: list[int], alone: list[int]) -> bool:
    """Whether the two part at a near tie; False where they are the same. Raises ModelError otherwise."""
    if together == alone:
        return False
    place = next((i for i, pair in enumerate(zip(together, alone, strict=False)) if pair[0] != pair[1]), None)
    if place is None:  # one is the other's beginning: impossible unless the end token was lost
        raise ModelError(_message(row, min(len(together), len(alone)), "ends elsewhere"))
    logits = _next_logits(model, row.prompt + alone[:place])
    gap = float(logits[alone[place]] - logits[together[place]]) / max(float(logits.std()), 1e-9)
    if gap > _TIE:
        raise ModelError(_message(row, place, f"{gap:.2f} standard deviations of the logits apart"))
    return True


def _next_logits(model, ids: list[int]):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float()


def _message(row: Pending, place: int, how: str) -> str:
    return (
        f"In a batch the model answers the question {row.question.id} otherwise than alone, from token {place + 1} on "
        f"({how}); padding is handled wrongly here: set hardware.backend=transformers, or generate.batch_size=1."
    )
