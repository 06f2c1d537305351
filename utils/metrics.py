"""From saved answers to per-question values: right or wrong, well formed or not, how long. Pure, no model needed."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from utils.parsing import count_paragraphs, explicit_letter, has_bullets, named_choices, parse_completion

_COLUMNS = (
    "id", "kind", "group", "correct", "parsed", "well_formed", "one_paragraph", "bullets", "stopped", "tokens",
    "reasoning_tokens",
)  # fmt: skip


def score_answers(answers: Mapping[str, dict], held_out: pd.DataFrame, benchmark: pd.DataFrame | None) -> pd.DataFrame:
    """One row for each answer: id, kind, group, correct (NaN where no rule can tell), parsed, and its form and length.

    An open answer is right if it is well formed and names exactly one of the row's `choices`, the right one. A
    multiple-choice answer is right if it states exactly one letter after the closed think block, the right one;
    an answer cut off or without a letter is wrong, and `parsed` tells how often that happened.
    """
    rows = held_out.set_index("id").to_dict("index")
    items = (
        {} if benchmark is None else benchmark.assign(id=benchmark["id"].astype(str)).set_index("id").to_dict("index")
    )
    scored = []
    for identifier, answer in answers.items():
        completion = parse_completion(answer["text"])
        if answer["kind"] == "choice":
            item = items[identifier]
            given = explicit_letter(completion.answer, item["options"])
            correct, parsed, group = float(given == item["gold"]), float(given is not None), identifier
            # Stated on the way and then cut off: nobody knows what the end would have been.
            correct *= float(answer["finish_reason"] == "stop")
        else:
            row = rows[identifier]
            correct, parsed = _check_open(completion, row)
            correct *= 1.0 if answer["finish_reason"] == "stop" else 0.0
            group = row["group"] if isinstance(row.get("group"), str) else identifier
        scored.append(
            {
                "id": identifier,
                "kind": answer["kind"],
                "group": group,
                "correct": correct,
                "parsed": parsed,
                "well_formed": float(completion.well_formed),
                "one_paragraph": float(count_paragraphs(completion.answer) == 1),
                "bullets": float(has_bullets(completion.answer)),
                "stopped": float(answer["finish_reason"] == "stop"),
                "tokens": answer["tokens"],
                "reasoning_tokens": answer["reasoning_tokens"],
            }
        )
    return pd.DataFrame(scored, columns=_COLUMNS).sort_values("id", ignore_index=True)


def _check_open(completion, row: Mapping) -> tuple[float, float]:
    """(correct, parsed) of an open answer; NaN for a row whose answer no rule can check."""
    if not isinstance(row.get("answer"), str) or row.get("choices") is None:
        return float("nan"), float("nan")
    named = named_choices(completion.answer, row["choices"]) if completion.well_formed else []
    return float(named == [row["answer"]]), float(len(named) == 1)


def nll_per_token(frame: pd.DataFrame) -> pd.DataFrame:
    """Per row, nats per token of the whole completion, of its reasoning and of its response, indexed by id."""
    total = frame["reasoning_nll"] + frame["response_nll"]
    tokens = frame["reasoning_tokens"] + frame["response_tokens"]
    return pd.DataFrame(
        {
            "completion": total / tokens,
            "reasoning": frame["reasoning_nll"] / frame["reasoning_tokens"].clip(lower=1),
            "response": frame["response_nll"] / frame["response_tokens"].clip(lower=1),
        }
    ).set_index(frame["id"])
