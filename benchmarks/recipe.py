"""The training recipe of notebook 03, so that what is measured is what the notebook runs."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd

from utils.data.prompts import format_row
from utils.evaluation.loss import tokenize_row
from utils.project import NOTEBOOKS
from utils.schema import Config


def notebook_source() -> str:
    """The source of load_with_lora and make_trainer, as they stand in the notebook's cells."""
    cells = nbformat.read(NOTEBOOKS / "03_lora_training.ipynb", as_version=4).cells
    starts = ("def load_with_lora", "def make_trainer")
    return "\n\n\n".join(cell.source for cell in cells if cell.cell_type == "code" and cell.source.startswith(starts))


def notebook_functions() -> tuple[Callable, Callable]:
    """load_with_lora and make_trainer, ready to be called, and to be read as a kernel's are."""
    names, source, place = {}, notebook_source(), "03_lora_training.ipynb"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    exec(compile(source, place, "exec"), names)
    return names["load_with_lora"], names["make_trainer"]


def format_rows(path: Path, tokenizer, config: Config, count: int) -> pd.DataFrame:
    """prompt, completion and tokens of the rows in a JSONL file, repeated until there are `count`."""
    raw = pd.read_json(path, lines=True)
    pairs = [format_row(row, config.prompt) for row in raw.to_dict("records")]
    frame = pd.DataFrame(pairs, columns=["prompt", "completion"])
    frame["tokens"] = [len(tokenize_row(tokenizer, *pair)["input_ids"]) for pair in pairs]
    return pd.concat([frame] * -(-count // len(frame)), ignore_index=True).head(count)
