"""How much does a lenient scorer flatter, and how often does the strict one err where an answer has no letter?

    python -m benchmarks.extraction COMPLETIONS.jsonl MEDQA.jsonl --out benchmarks/results/extraction.json

The first file's real completions are scored strictly and by any letter: each line has completion, options (letter to text)
and answer_idx; `their_predicted` is what the authors' own scorer read. The second file's options are looked for in the
answers of tests/labels/smollm2_answers.jsonl, which were labelled by reading. Only counts are written, no text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from utils.evaluation.answer_parsing import any_letter, explicit_letter, parse_completion
from utils.files import write_json
from utils.project import ROOT

LABELLED = ROOT / "tests" / "labels" / "smollm2_answers.jsonl"


def measure(rows: list[dict]) -> dict:
    """Shares of the completions: cut off, with an explicit letter, and right by each scorer."""
    completions = [parse_completion(row["completion"]) for row in rows]
    strict = [explicit_letter(c.answer, row["options"]) for c, row in zip(completions, rows, strict=True)]
    lenient = [any_letter(row["completion"], row["options"]) for row in rows]

    def right(letters: list[str | None]) -> float:
        hits = sum(letter == row["answer_idx"] for letter, row in zip(letters, rows, strict=True))
        return round(hits / len(rows), 4)

    return {
        "completions": len(rows),
        "cut_off": round(sum(not c.closed for c in completions) / len(rows), 4),
        "explicit_letter": round(sum(letter is not None for letter in strict) / len(rows), 4),
        "strict_accuracy": right(strict),
        "any_letter_accuracy": right(lenient),
        "published_scorer_accuracy": right([row.get("their_predicted") for row in rows]),
    }


def compare_with_labels(labelled: list[dict], items: list[dict]) -> dict:
    """Of the labelled answers without a letter: how many name an option in full, get a wrong one, or are missed."""
    options = {item["id"]: item["options"] for item in items}
    found = [explicit_letter(row["answer"], options[row["id"]]) for row in labelled]
    pairs = list(zip(found, labelled, strict=True))
    return {
        "answers": len(labelled),
        "name_an_option_in_full": sum(row["in_full"] for row in labelled),
        "false": sum(letter is not None and letter != row["label"] for letter, row in pairs),
        "missed": sum(letter is None and row["in_full"] for letter, row in pairs),
    }


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def main(sample: Path, items: Path, out: Annotated[Path, typer.Option(help="Where the counts go, JSON.")]) -> None:
    """Score SAMPLE both ways, compare with the labels by the options in ITEMS, and write the counts to OUT."""
    labels = compare_with_labels(read_lines(LABELLED), read_lines(items))
    write_json(out, measure(read_lines(sample)) | {"letterless": labels})


if __name__ == "__main__":
    typer.run(main)
