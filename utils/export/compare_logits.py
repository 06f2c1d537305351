"""What a model says to fixed prompts, greedily, kept so that another process can compare an export with it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.files import atomic
from utils.progress import Progress, track

NEW_TOKENS = 48  # greedy tokens compared for each prompt
EXACT = 1e-4  # largest difference of a logit where everything is computed in float32
HALF = 0.05  # in float16: root mean square of the differences, in standard deviations of the logits
BFLOAT16 = 0.15  # the same in bfloat16, whose steps are eight times as wide; 8B shapes with random weights: 0.083
FOUR_BIT = 0.5  # the same where one was merged before it was quantised and the other after
_MEASURED = ("largest_logit_difference", "relative_logit_difference", "largest_margin_lost")
Level = Literal["exact", "half", "bfloat16", "four bit"]
_ALLOWED = {"half": HALF, "bfloat16": BFLOAT16, "four bit": FOUR_BIT}
LEVELS = (
    f"`exact`: the same tokens, logits within {EXACT:.0e}. `half`: logits at the first new token within {HALF} of their "
    f"spread, and only undecided tokens may turn. `bfloat16`: the same within {BFLOAT16}. `four bit`: within {FOUR_BIT} of their spread. `margin`: by tokens alone; "
    "where they part, the best token lay at most so many logits above its second. `reported`: nothing was required."
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
        from safetensors.torch import save

        with atomic(path) as scratch:
            metadata = {"tokens": json.dumps(self.tokens)}
            # By way of bytes: what the disk refuses then comes as an OSError, which save_file makes something else of.
            scratch.write_bytes(save({"logits": self.logits, "best": self.best}, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> Continuations:
        """What `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as stored:
            tokens = json.loads(stored.metadata()["tokens"])
            return cls(tokens, stored.get_tensor("logits"), stored.get_tensor("best"))


def continue_greedily(model, tokenizer, prompts: Sequence[str], description: str) -> Continuations:
    """Decode greedily, prompts of one length together, so that no padding is involved."""
    import torch

    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens: list[list[int]] = [[] for _ in prompts]
    first = torch.zeros(len(prompts), vocabulary)
    best = torch.full((len(prompts), NEW_TOKENS, 2), float("nan"))
    with Progress(description, len(prompts), "prompt") as bar:
        for group in _equal_lengths(encoded):
            with torch.inference_mode():
                answer = model.generate(
                    torch.tensor([encoded[i] for i in group], device=model.device),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            steps = torch.stack([step.float().cpu() for step in answer.logits], dim=1)
            for row, i in enumerate(group):
                tokens[i] = _until(answer.sequences[row, len(encoded[i]) :].tolist(), tokenizer.eos_token_id)
                first[i] = steps[row, 0]
                best[i, : len(tokens[i])] = steps[row, : len(tokens[i])].topk(2, dim=-1).values
            bar.update(len(group))
    return Continuations(tokens, first, best)


def follow(model, tokenizer, prompts: Sequence[str], leader: Continuations, description: str) -> Continuations:
    """What the model would say at each step of the leader's continuations, in one pass for each prompt.

    While the best token is the leader's, greedy decoding would have come the same way; the tokens end at the first
    that is another.
    """
    import torch

    tokens, first = [], []
    best = torch.full((len(prompts), NEW_TOKENS, 2), float("nan"))
    for number, prompt in enumerate(track(prompts, description, unit="prompt")):
        ids, led = tokenizer(prompt).input_ids, leader.tokens[number]
        with torch.inference_mode():
            whole = model(torch.tensor([ids + led[:-1]], device=model.device), use_cache=False).logits[0]
        logits = whole[len(ids) - 1 :].float().cpu()
        chosen = logits.argmax(-1).tolist()
        same = common_start(chosen, led)
        tokens.append(chosen[: same + 1])
        first.append(logits[0])
        best[number, : len(logits)] = logits.topk(2, dim=-1).values
    return Continuations(tokens, torch.stack(first).clone(), best)


def _equal_lengths(encoded: Sequence[Sequence[int]], most: int = 16) -> list[list[int]]:
    """Indices in groups of equal length, `most` at once."""
    groups: dict[int, list[int]] = {}
    for i, ids in enumerate(encoded):
        groups.setdefault(len(ids), []).append(i)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two continuations begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def larger(first: float, second: float) -> float:
    """The larger of two; NaN where either is, over which Python's max can pass."""
    return next((value for value in (first, second) if math.isnan(value)), max(first, second))


def compare(reference: Continuations, other: Continuations) -> dict[str, float | int]:
    """How far `other` is from `reference`.

    `identical`: prompts with the same tokens throughout. `largest_logit_difference`: over the whole vocabulary at the
    first new token, and the best token's logit at every step up to where they part. `relative_logit_difference`: root
    mean square at the first new token, in standard deviations of the reference. `largest_margin_lost`: where they part,
    how far the reference's best token lay above its second; 0 where they never part.
    """
    difference = other.logits - reference.logits
    largest = float(difference.abs().max())
    relative = float(difference.pow(2).mean().sqrt() / reference.logits.std())
    identical, common, margin = 0, 0, 0.0
    for number, (ours, theirs) in enumerate(zip(reference.tokens, other.tokens, strict=True)):
        same = common_start(ours, theirs)
        common += same
        steps = slice(0, same)
        if same:
            gap = (reference.best[number, steps, 0] - other.best[number, steps, 0]).abs().max()
            largest = larger(largest, float(gap))
        if ours == theirs:
            identical += 1
        elif same < NEW_TOKENS:
            top, second = reference.best[number, same].tolist()
            margin = larger(margin, top - second)
    return {
        "prompts": len(reference.tokens),
        "identical": identical,
        "mean_common_tokens": round(common / len(reference.tokens), 1),
        "largest_logit_difference": round(largest, 7),
        "relative_logit_difference": round(relative, 7),
        "largest_margin_lost": round(margin, 4),
    }


def judge(figures: dict[str, float | int], level: Level) -> str | None:
    """What is wrong with the figures of `compare`, in words, for the level of arithmetic; None where they pass.

    A figure that is NaN or infinite passes nowhere. exact: the same tokens, logits within EXACT. half, bfloat16:
    logits within HALF or BFLOAT16, and they part only where the reference was all but undecided: where its margin was
    less than twice the largest difference that was found. four bit: FOUR_BIT.
    """
    if not all(math.isfinite(figures[name]) for name in _MEASURED):
        return "logits of which one is no finite number"
    if level == "exact":
        if figures["identical"] < figures["prompts"]:
            return f"the same tokens for {figures['identical']} of {figures['prompts']} prompts, expected all"
        if not figures["largest_logit_difference"] <= EXACT:
            return f"logits differ by {figures['largest_logit_difference']:.1e}, at most {EXACT:.0e} is rounding"
        return None
    allowed = _ALLOWED[level]
    if not figures["relative_logit_difference"] <= allowed:
        return f"logits differ by {figures['relative_logit_difference']:.2f} of their spread, at most {allowed} is rounding"
    if level != "four bit" and figures["largest_margin_lost"] > 2 * figures["largest_logit_difference"]:
        return (
            f"tokens part where the best was {figures['largest_margin_lost']:.2f} ahead, though logits differ by "
            f"{figures['largest_logit_difference']:.2f} at most"
        )
    return None
