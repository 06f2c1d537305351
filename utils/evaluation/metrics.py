"""From saved answers to per-question values: right or wrong, well formed or not, how long. Pure, no model needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from utils.evaluation.answer_parsing import (
    Completion,
    count_paragraphs,
    explicit_letter,
    has_bullets,
    named_choices,
    parse_completion,
)


@dataclass(frozen=True)
class Metric:
    """What a paired metric is called, what it is counted in, and which way is up."""

    label: str
    unit: str  # "share", "nats per token", "tokens" or "score"
    higher_is_better: bool


METRICS = {
    "accuracy": Metric("accuracy", "share", True),
    "multiple_choice": Metric("multiple-choice accuracy, strict", "share", True),
    "multiple_choice_forced": Metric("multiple-choice accuracy, forced", "share", True),
    "letter_logprobs": Metric("likeliest letter (knowledge, no reasoning)", "share", True),
    "parsed": Metric("answers with an explicit letter", "share", True),
    "truncated": Metric("answers cut off at the limit", "share", False),
    "nll": Metric("held-out loss", "nats per token", False),
    "nll_reasoning": Metric("held-out loss of the reasoning", "nats per token", False),
    "nll_response": Metric("held-out loss of the response", "nats per token", False),
    "well_formed": Metric("well-formed answers", "share", True),
    "one_paragraph": Metric("answers in one paragraph", "share", True),
    "bullets": Metric("answers with bullets", "share", False),
    "reasoning_tokens": Metric("length of the reasoning", "tokens", False),
    "answer_tokens": Metric("length of the answer", "tokens", False),
    "rouge_l": Metric("ROUGE-L (wording, not truth)", "score", True),
}
_COLUMNS = (
    "id", "kind", "benchmark", "group", "correct", "parsed", "letter", "forced", "well_formed", "one_paragraph",
    "bullets", "stopped", "truncated", "tokens", "reasoning_tokens", "answer_tokens",
)  # fmt: skip


def find_metric(name: str) -> Metric:
    """The metric called `name`; `multiple_choice:pubmedqa` is `multiple_choice` on a further benchmark."""
    base, _, benchmark = name.partition(":")
    metric = METRICS[base]
    return Metric(f"{metric.label} ({benchmark})", metric.unit, metric.higher_is_better) if benchmark else metric


def score_answers(
    answers: Mapping[str, dict],
    held_out: pd.DataFrame,
    benchmark: pd.DataFrame | None,
    forced: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """One row for each answer: id, kind, group, correct (NaN where no rule can tell), parsed, and its form and length.

    An open answer is right if it is well formed and names exactly one of the row's `choices`, the right one. A
    multiple-choice answer is right if it states exactly one letter after the closed think block, the right one; an
    answer cut off or without a letter is wrong, and `parsed` tells how often that happened. `forced` ({id: letter})
    are the letters read from the logits where an answer was cut off; with them the column `forced` tells whether the
    stated or forced letter is right.
    """
    rows = held_out.set_index("id").to_dict("index")
    items = {} if benchmark is None else {str(item["id"]): item for item in benchmark.to_dict("records")}
    scored = []
    for identifier, answer in answers.items():
        completion = parse_completion(answer["text"])
        if answer["kind"] == "choice":
            known = items[identifier]
            score = score_choice(completion, known, (forced or {}).get(identifier))
        elif answer["kind"] == "open":
            known = rows[identifier]
            score = score_open(completion, known)
        else:
            continue  # the tutorials' question: shown, never counted
        # Stated on the way and then cut off: nobody knows what the end would have been.
        score["correct"] *= float(answer["finish_reason"] == "stop")
        group = known.get("group")
        benchmark_name = known.get("benchmark", "") if answer["kind"] == "choice" else ""
        about = {"id": identifier, "kind": answer["kind"], "benchmark": benchmark_name}
        about["group"] = group if isinstance(group, str) else identifier
        scored.append({**about, **score, **_form(completion, answer)})
    return pd.DataFrame(scored, columns=_COLUMNS).sort_values("id", ignore_index=True)


def score_choice(completion: Completion, item: Mapping, forced: str | None) -> dict:
    """Strict: right where exactly the right letter is stated after a closed think block."""
    letter = explicit_letter(completion.answer, item["options"])
    return {
        "correct": float(letter == item["gold"]),
        "parsed": float(letter is not None),
        "letter": letter,
        "forced": float((letter or forced) == item["gold"]),
    }


def score_open(completion: Completion, row: Mapping) -> dict:
    """Right where the right one of the row's choices is named and no other; NaN for a row that no rule can check."""
    correct = parsed = float("nan")
    if isinstance(row.get("answer"), str) and row.get("choices") is not None:
        named = named_choices(completion.answer, row["choices"]) if completion.well_formed else []
        correct, parsed = float(named == [row["answer"]]), float(len(named) == 1)
    return {"correct": correct, "parsed": parsed, "letter": None, "forced": float("nan")}


def _form(completion: Completion, answer: Mapping) -> dict:
    stopped = float(answer["finish_reason"] == "stop")
    return {
        "well_formed": float(completion.well_formed),
        "one_paragraph": float(count_paragraphs(completion.answer) == 1),
        "bullets": float(has_bullets(completion.answer)),
        "stopped": stopped,
        "truncated": 1.0 - stopped,
        "tokens": answer["tokens"],
        "reasoning_tokens": answer["reasoning_tokens"],
        "answer_tokens": answer["tokens"] - answer["reasoning_tokens"],
    }


def needs_forcing(answer: Mapping, letters) -> bool:
    """Whether a multiple-choice answer was cut off, or never left its think block, before it stated a letter."""
    completion = parse_completion(answer["text"])
    unfinished = answer["finish_reason"] == "length" or not completion.closed
    return unfinished and explicit_letter(completion.answer, letters) is None


class _Words:
    """rouge_score's own tokenizer drops everything but a to z and 0 to 9: Chinese would score nothing."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]", text) if _wide(text) else re.findall(r"\w+", text.casefold())


def _wide(text: str) -> bool:
    """Whether most of the text is in a script that writes no spaces between words."""
    letters = [c for c in text if c.isalpha()]
    return sum("\u3040" <= c <= "\u9fff" for c in letters) > len(letters) / 2


def rouge_l(answers: Mapping[str, dict], held_out: pd.DataFrame) -> pd.Series:
    """ROUGE-L F1 of each open answer against its row's Response, by id (Lin 2004, through rouge_score).

    It measures wording: an answer with every fact turned into its opposite scores 0.93.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    references = dict(zip(held_out["id"], held_out["Response"], strict=True))
    texts = {i: parse_completion(a["text"]).answer for i, a in answers.items() if a["kind"] == "open"}
    return pd.Series(
        {i: scorer.score(references[i], text)["rougeL"].fmeasure for i, text in texts.items()}, dtype=float
    )


def loss_per_token(frame: pd.DataFrame) -> pd.DataFrame:
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
