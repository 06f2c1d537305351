"""How much does a lenient scorer flatter? The same real completions, scored strictly and by any letter.

    python -m benchmarks.extraction think_completions_sample.jsonl --out benchmarks/results/extraction.json

Each line has completion, options (letter to text) and answer_idx; `their_predicted` is what the authors' own scorer read.
Only counts are written, no text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from utils.evaluation.answer_parsing import any_letter, explicit_letter, parse_completion
from utils.files import write_json


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


def main(sample: Path, out: Annotated[Path, typer.Option(help="Where the counts go, JSON.")]) -> None:
    """Score SAMPLE both ways and write the shares to OUT."""
    lines = sample.read_text(encoding="utf-8").split("\n")
    write_json(out, measure([json.loads(line) for line in lines if line.strip()]))


if __name__ == "__main__":
    typer.run(main)
