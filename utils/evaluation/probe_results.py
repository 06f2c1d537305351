"""The letter probe's prompt and its figures on file: pure, so that they can be compared without torch or lm_eval.

The probe asks which letter is likeliest right after "Answer:", with no room to reason. It measures what a model knows,
not how it reasons, and so says little of what training on chains of thought changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd

from utils.data.rows import read_table
from utils.errors import StageOrderError
from utils.evaluation.questions import arm_digest
from utils.pipeline.run_dir import RunDir
from utils.sealed import read_lines


def probe_items(run: RunDir) -> pd.DataFrame:
    """All items of the first benchmark, as 00 froze them where evaluate.probe is on."""
    return read_table(run.file("data/probe_items.jsonl"), "evaluate.probe", ("question", "options"))


def format_probe(question: str, options: dict[str, str]) -> str:
    """The prompt of lm-eval's task medqa_4options, letter for letter, for any number of options."""
    lines = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return f"Question: {question}\n{lines}Answer:"


def probe_key(question: str, options: dict[str, str], gold: str, arm: str) -> str:
    """A digest of arm, prompt and right letter: figures with the same key are the same model's on the same item."""
    asked = [arm, format_probe(question, options), gold]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def current_probe(path: Path, items: pd.DataFrame, arm: str) -> pd.DataFrame | None:
    """The figures on file in the order of `items`, or None unless each item has its own by this `arm`.

    `items` has id, question, options and gold; the frame's columns are those of `probe.probe_letters`.
    """
    found = {(row["id"], row["key"]): row for row in read_lines(path)}
    wanted = [(str(i.id), probe_key(i.question, i.options, i.gold, arm)) for i in items.itertuples()]
    return pd.DataFrame([found[key] for key in wanted]) if all(key in found for key in wanted) else None


def paired_probe(run: RunDir) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Both arms' figures, item by item; None where evaluate.probe is off.

    Raises StageOrderError where an arm's figures are missing.
    """
    if not run.config.evaluate.probe:
        return None
    items, found = probe_items(run), []
    for arm in ("baseline", "tuned"):
        figures = current_probe(run.file(f"{arm}/probe.jsonl"), items, arm_digest(run, arm))
        if figures is None:
            raise StageOrderError(
                f"{arm}/probe.jsonl does not hold all {len(items)} items; run the notebook that writes it again, with "
                "evaluate.probe on."
            )
        found.append(figures)
    return found[0], found[1]
