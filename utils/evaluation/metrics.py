"""From saved answers to per-question values: right or wrong, well formed or not, how long."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from utils.evaluation import answer_parsing as parsing


class Metric(NamedTuple):
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


def find_metric(name: str) -> Metric:
    """The metric called `name`; `multiple_choice:pubmedqa` is `multiple_choice` on a further benchmark."""
    base, _, benchmark = name.partition(":")
    metric = METRICS[base]
    return metric._replace(label=f"{metric.label} ({benchmark})") if benchmark else metric


def score_answers(
    answers: Mapping[str, dict], held_out: pd.DataFrame, benchmark: pd.DataFrame | None, forced: Mapping[str, str] = {}
) -> pd.DataFrame:
    """One row for each answer: id, kind, group, correct (NaN where no rule can tell), parsed, and its form and length.

    An open answer is right if it is well formed and names exactly one of the row's `choices`, the right one; a
    multiple-choice answer if it states exactly one option after the closed think block, the right one. What is cut off
    or states none is wrong. The column `forced` tells whether the stated letter is right, or the one in `forced`
    ({id: letter}), read from the logits where an answer states none.
    """
    items = pd.DataFrame({"id": []}) if benchmark is None else benchmark.assign(id=benchmark["id"].astype(str))
    known = {kind: frame.set_index("id").to_dict("index") for kind, frame in (("open", held_out), ("choice", items))}
    scored = []
    for identifier, answer in answers.items():
        kind = answer["kind"]
        if kind not in known:
            continue  # the tutorials' question: shown, never counted
        row, completion = known[kind][identifier], parsing.parse_completion(answer["text"])
        score = _score(kind, completion, row, forced.get(identifier))
        group, stopped = row.get("group"), float(answer["finish_reason"] == "stop")
        columns = {
            "id": identifier,
            "kind": kind,
            "benchmark": row.get("benchmark", ""),
            "group": group if isinstance(group, str) else identifier,
            **score,
            # Stated on the way and then cut off: nobody knows what the end would have been.
            "correct": score["correct"] * stopped,
            "well_formed": float(completion.well_formed),
            "one_paragraph": float(parsing.count_paragraphs(completion.answer) == 1),
            "bullets": float(parsing.has_bullets(completion.answer)),
            "stopped": stopped,
            "truncated": 1.0 - stopped,
            "tokens": answer["tokens"],
            "reasoning_tokens": answer["reasoning_tokens"],
            "answer_tokens": answer["tokens"] - answer["reasoning_tokens"],
        }
        scored.append(columns)
    return pd.DataFrame(scored).sort_values("id", ignore_index=True)


def _score(kind: str, completion: parsing.Completion, row: Mapping, forced: str | None) -> dict:
    correct = parsed = either = float("nan")
    letter = None
    if kind == "choice":
        letter = parsing.explicit_letter(completion.answer, row["options"])
        correct, parsed, either = letter == row["gold"], letter is not None, (letter or forced) == row["gold"]
    elif isinstance(row.get("answer"), str) and row.get("choices") is not None:
        named = parsing.named_choices(completion.answer, row["choices"]) if completion.well_formed else []
        correct, parsed = named == [row["answer"]], len(named) == 1
    return {"correct": float(correct), "parsed": float(parsed), "letter": letter, "forced": float(either)}


def rouge_l(answers: Mapping[str, dict], held_out: pd.DataFrame) -> pd.Series:
    """ROUGE-L F1 of open answers against their Response, by id (Lin 2004, by rouge_score): wording, not truth."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    references = dict(zip(held_out["id"], held_out["Response"], strict=True))
    texts = {i: parsing.parse_completion(a["text"]).answer for i, a in answers.items() if a["kind"] == "open"}
    scores = {i: scorer.score(references[i], text)["rougeL"].fmeasure for i, text in texts.items()}
    return pd.Series(scores, dtype=float)


def loss_per_token(frame: pd.DataFrame) -> pd.DataFrame:
    """Per row, nats per token of the whole completion, of its reasoning and of its response, indexed by id."""
    frame = frame.set_index("id")
    nats, tokens = (frame[f"reasoning_{what}"] + frame[f"response_{what}"] for what in ("nll", "tokens"))
    parts = {part: frame[f"{part}_nll"] / frame[f"{part}_tokens"].clip(lower=1) for part in ("reasoning", "response")}
    return pd.DataFrame({"completion": nats / tokens, **parts})
