"""What a model answers to fixed prompts, greedily, kept so that another process can compare an export with it."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from utils.files import atomic
from utils.progress import track

NEW_TOKENS = 48  # greedy tokens compared for each prompt
EXACT = 1e-4  # largest difference of a logit where everything is kept and computed in float32
# Root mean square of the logits' differences, in standard deviations of the logits, where something is rounded to a
# coarser dtype. bfloat16's steps are eight times as wide as float16's; 8B shapes with random weights: 0.083. 4-bit:
# one model was merged before it was quantised and the other after.
ROUNDED = {"float16": 0.05, "bfloat16": 0.15, "4-bit": 0.5}
LEVELS = (
    f"`exact`: the same tokens, logits within {EXACT:.0e}. `rounded`: logits at the first new token within "
    + ", ".join(f"{spread} ({dtype})" for dtype, spread in ROUNDED.items())
    + " of their spread, and only undecided tokens may turn, but in 4-bit. `margin`: by tokens alone; where they part, "
    "the best token lay at most so many logits above its second. `reported`: nothing was required."
)


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of n prompts.

    `tokens`: up to NEW_TOKENS ids for each prompt, the end token included. `logits` (n, vocabulary): of the first new
    token. `best` (n, NEW_TOKENS, 2): the two largest logits at every step, NaN after the end. All float32.
    """

    tokens: list[list[int]]
    logits: Any
    best: Any

    def save(self, path: Path) -> None:
        """As safetensors, which any reader opens; the tokens travel in its header."""
        with atomic(path) as scratch:
            tensors = {"logits": self.logits, "best": self.best}
            save_file(tensors, scratch, metadata={"tokens": json.dumps(self.tokens)})

    @classmethod
    def load(cls, path: Path) -> "Continuations":
        """What `save` wrote."""
        with safe_open(path, framework="pt") as stored:
            tokens = json.loads(stored.metadata()["tokens"])
            return cls(tokens, stored.get_tensor("logits"), stored.get_tensor("best"))


def continue_greedily(model, tokenizer, prompts: Sequence[str], description: str) -> Continuations:
    """Decode greedily, one prompt after the other, so that no padding is involved."""
    tokens, first = [], []
    best = torch.full((len(prompts), NEW_TOKENS, 2), float("nan"))
    for number, prompt in enumerate(track(prompts, description, unit="prompt")):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        with torch.inference_mode():
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None,
                top_p=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        logits = torch.cat(answer.logits).float().cpu()
        tokens.append(answer.sequences[0, ids.shape[1] :].tolist())
        first.append(logits[0])
        best[number, : len(logits)] = logits.topk(2, dim=-1).values
    return Continuations(tokens, torch.stack(first), best)


def follow(model, tokenizer, prompts: Sequence[str], leader: Continuations, description: str) -> Continuations:
    """What the model would say at each step of the leader's continuations, up to its first other token."""
    tokens, first = [], []
    best = torch.full((len(prompts), NEW_TOKENS, 2), float("nan"))
    for number, prompt in enumerate(track(prompts, description, unit="prompt")):
        ids, led = tokenizer(prompt).input_ids, leader.tokens[number]
        with torch.inference_mode():
            whole = model(torch.tensor([ids + led[:-1]], device=model.device), use_cache=False).logits[0]
        logits = whole[len(ids) - 1 :].float().cpu()
        chosen = logits.argmax(-1).tolist()
        tokens.append(chosen[: _common_start(chosen, led) + 1])
        first.append(logits[0])
        best[number, : len(logits)] = logits.topk(2, dim=-1).values
    return Continuations(tokens, torch.stack(first), best)


def _common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two continuations begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def compare_tokens(reference: Continuations, tokens: Sequence[Sequence[int]]) -> dict[str, float | int]:
    """How far other tokens follow the reference.

    `identical`: prompts with the same tokens throughout. `largest_margin_lost`: where they part, how far the reference's
    best token lay above its second; 0 where they never part.
    """
    common = [_common_start(ours, theirs) for ours, theirs in zip(reference.tokens, tokens, strict=True)]
    same = [ours == list(theirs) for ours, theirs in zip(reference.tokens, tokens, strict=True)]
    parted = [(i, at) for i, at in enumerate(common) if not same[i] and at < NEW_TOKENS]
    margins = [float(reference.best[i, at, 0] - reference.best[i, at, 1]) for i, at in parted]
    return {
        "prompts": len(common),
        "identical": sum(same),
        "mean_common_tokens": round(sum(common) / len(common), 1),
        "largest_margin_lost": round(float(np.max(margins, initial=0.0)), 4),  # NaN where any is
    }


def compare(reference: Continuations, other: Continuations) -> dict[str, float | int]:
    """`compare_tokens`, and how far the logits of `other` are from the reference's.

    `largest_logit_difference`: over the whole vocabulary at the first new token, and the best token's logit at every
    step up to where they part. `relative_logit_difference`: root mean square at the first new token, in standard
    deviations of the reference.
    """
    difference = other.logits - reference.logits
    gaps = [float(difference.abs().max())]
    for number, (ours, theirs) in enumerate(zip(reference.tokens, other.tokens, strict=True)):
        if same := _common_start(ours, theirs):
            steps = other.best[number, :same, 0] - reference.best[number, :same, 0]
            gaps.append(float(steps.abs().max()))
    return compare_tokens(reference, other.tokens) | {
        "largest_logit_difference": round(float(np.max(gaps)), 7),
        "relative_logit_difference": round(float(difference.pow(2).mean().sqrt() / reference.logits.std()), 7),
    }


def choose_tolerance(dtypes: Iterable[str]) -> str:
    """`exact` where all that was kept and computed is float32, else the coarsest dtype among them, a key of ROUNDED."""
    return next((dtype for dtype in reversed(ROUNDED) if dtype in dtypes), "exact")


def check_tolerance(figures: dict[str, float | int], tolerance: str) -> str | None:
    """What is wrong with the figures of `compare`, in words; None where they pass LEVELS."""
    largest, relative = figures["largest_logit_difference"], figures["relative_logit_difference"]
    margin = figures["largest_margin_lost"]
    if not all(map(math.isfinite, (largest, relative, margin))):
        return "logits of which one is no finite number"
    if tolerance == "exact":
        if figures["identical"] < figures["prompts"]:
            return f"the same tokens for {figures['identical']} of {figures['prompts']} prompts, expected all"
        return f"logits differ by {largest:.1e}, at most {EXACT:.0e} is rounding" if largest > EXACT else None
    if relative > ROUNDED[tolerance]:
        return f"logits differ by {relative:.2f} of their spread, at most {ROUNDED[tolerance]} is rounding"
    if tolerance != "4-bit" and margin > 2 * largest:
        return f"tokens part where the best was {margin:.2f} ahead, though logits differ by {largest:.2f} at most"
    return None
