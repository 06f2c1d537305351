"""Multiple-choice items of MedQA, MedMCQA and PubMedQA, from the Hub or a file, in one form."""

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from utils.data.hub import load_hub_table
from utils.data.near_duplicates import group_duplicates, near_pairs, vectorise
from utils.data.rows import read_table
from utils.errors import DataError
from utils.files import parse_json
from utils.schema import BenchmarkSection, Config, EvaluateSection

COLUMNS = ("id", "benchmark", "question", "options", "gold", "group", "stem")
_TELLING = {"medmcqa": {"opa", "cop"}, "pubmedqa": {"final_decision"}, "medqa": None}  # columns that others lack
_MEDQA = ("question", "options", "answer_idx")
_MEDMCQA = ("question", "opa", "opb", "opc", "opd", "cop")
_PUBMEDQA = ("question", "final_decision")


def load_benchmarks(evaluate: EvaluateSection) -> pd.DataFrame | None:
    """The drawn items of all benchmarks, or None where none is named.

    Columns: id (unique; `name:` comes before it in all but the first benchmark), benchmark (its name), question (as it
    is asked), options (dict of letter to text), gold (a letter), group (near duplicates share the first one's id) and
    stem (the question without PubMedQA's abstract: what near duplicates are compared by). As many items as `rows` asks
    for are drawn by evaluate.seed, in the order of the file. Raises DataError for items that are not as expected.
    """
    frames: list[pd.DataFrame] = []
    for section in evaluate.benchmarks:
        key = "evaluate.benchmark" if section is evaluate.benchmark else "evaluate.more_benchmarks"
        items, source, name = _read(section, key)
        if section.rows > len(items):
            raise DataError(f"{key}.rows asks for {section.rows} items; {source} has {len(items)}.")
        chosen = np.sort(np.random.default_rng(evaluate.seed).permutation(len(items))[: section.rows])
        items = items.iloc[chosen].reset_index(drop=True)
        taken = {frame["benchmark"].iloc[0] for frame in frames}
        names = (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3)))
        items["benchmark"] = next(one for one in names if one not in taken)
        if frames:
            items["id"] = items["benchmark"] + ":" + items["id"]
        frames.append(items)
    if not frames:
        return None
    return _grouped(pd.concat(frames, ignore_index=True))[list(COLUMNS)]


def load_items(section: BenchmarkSection) -> pd.DataFrame:
    """All items of one benchmark, for the letters' log-probabilities: COLUMNS but `benchmark`; raises as `load_benchmarks`."""
    items = _read(section, "evaluate.benchmark")[0].reset_index(drop=True)
    return _grouped(items)[["id", "question", "options", "gold", "group", "stem"]]


def _grouped(items: pd.DataFrame) -> pd.DataFrame:
    """The items with `group`: near duplicates share the first one's id."""
    pairs = near_pairs(vectorise(list(items["stem"])))
    numbers = pd.Series(group_duplicates(len(items), (pairs.left, pairs.right)))
    return items.assign(group=items["id"].groupby(numbers).transform("first"))


def describe_primary(config: Config) -> str:
    """The primary metric in words, and why it is not the profile's benchmark where the rows are the reader's own."""
    names = {"accuracy": "accuracy by rule", "multiple_choice": "multiple-choice accuracy", "nll": "held-out loss"}
    text = f"primary metric: {names[config.evaluate.primary]}"
    if config.evaluate.primary == "nll" and config.data.path is not None and config.evaluate.benchmark.wanted:
        beside = config.evaluate.benchmark.path or config.evaluate.benchmark.name
        text += f" on {config.data.path.name}; {beside} is measured beside it, evaluate.primary=multiple_choice puts it first"
    return text


def _read(section: BenchmarkSection, key: str) -> tuple[pd.DataFrame, str, str]:
    """(all items, their source for messages, the benchmark's name: one of the known ones by name or columns, else its own)."""
    if section.path is not None:
        source, own = section.path.name, section.path.stem
        table = read_table(section.path, f"{key}.path", _MEDQA)
    else:
        source, own = str(section.name), str(section.name).rsplit("/", 1)[-1]
        table = load_hub_table(source, section.subset, section.revision, section.split, f"{key}.path")
    columns, folded = {str(column).lower() for column in table.columns}, own.lower().replace("-", "").replace("_", "")
    known = (name for name, its in _TELLING.items() if name in folded or (its and its <= columns))
    return _check(_convert(table, source, section.split), source), source, next(known, own)


def _convert(table: pd.DataFrame, source: str, split: str) -> pd.DataFrame:
    """id, question, options, gold and stem from whichever of the three schemas the columns are."""
    lower = {str(column): str(column).lower() for column in table.columns if str(column).isupper()}
    table = table.rename(columns={**lower, "CONTEXTS": "context"})  # PubMedQA's own file has QUESTION, CONTEXTS
    columns = set(table.columns)
    if columns >= set(_MEDMCQA):
        items = _from_medmcqa(table, source)
    elif columns >= set(_PUBMEDQA) and columns & {"context", "pubid", "id"}:
        items = _from_pubmedqa(table)
    elif columns >= set(_MEDQA):
        options = [_options(cell) for cell in table["options"]]
        items = pd.DataFrame({"question": table["question"], "options": options, "gold": table["answer_idx"]})
    else:
        missing = [column for column in _MEDQA if column not in columns]
        medqa, medmcqa = "question, options and answer_idx (MedQA)", "question, opa to opd and cop (MedMCQA)"
        expected = f"{medqa}, {medmcqa}, or question, context and final_decision (PubMedQA)"
        raise DataError(f"{source} lacks {', '.join(missing)}; expected {expected}.")
    ids = next((table[column].astype(str) for column in ("id", "pubid") if column in columns), None)
    items.insert(0, "id", [f"{split}-{i}" for i in range(len(items))] if ids is None else ids.to_numpy())
    if "stem" not in items:
        items["stem"] = items["question"]
    return items


def _options(cell: Any) -> Any:
    """{letter: text} from a dict, a list of {key, value}, or either as JSON text (in a CSV); empty ones fall away."""
    if isinstance(cell, str):
        with suppress(ValueError):
            cell = parse_json(cell)
    if isinstance(cell, (list, np.ndarray)) and all(isinstance(o, dict) and {"key", "value"} <= set(o) for o in cell):
        cell = {option["key"]: option["value"] for option in cell}
    if not isinstance(cell, dict):
        return cell
    return {key: _text(text) for key, text in cell.items() if _text(text)}


def _from_medmcqa(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """The right option counts from 0 on the Hub and from 1 in the original files; a 0 or a 4 somewhere tells which."""
    right = pd.to_numeric(table["cop"], errors="coerce").astype(float)
    if right.isna().any() or (right % 1 != 0).any():
        raise DataError(f"{source}: cop must be a whole number, the right option's place (MedMCQA).")
    values = {int(place) for place in right}
    if -1 in values:
        raise DataError(f"{source} has items without a right option (cop is -1); take MedMCQA's split validation.")
    if (0 in values) == (4 in values) or not values <= set(range(5)):
        found = f"{source}: cop holds {', '.join(map(str, sorted(values)))}, so where it counts from cannot be told"
        raise DataError(f"{found}; expected 0 to 3 (the Hub), or 1 to 4 (the original files), over the whole file.")
    letters = "ABCD" if 0 in values else " ABCD"
    options = [_options(dict(zip("ABCD", cells, strict=True))) for cells in table[list(_MEDMCQA[1:5])].to_numpy()]
    return pd.DataFrame({"question": table["question"], "options": options, "gold": [letters[int(i)] for i in right]})


def _from_pubmedqa(table: pd.DataFrame) -> pd.DataFrame:
    """The question is asked below its abstract; the answer is yes, no or maybe."""
    contexts = table["context"] if "context" in table.columns else [""] * len(table)
    asked = [
        f"{context}\n\n{stem}" if context and isinstance(stem, str) and stem.strip() else stem
        for context, stem in zip(map(_context, contexts), table["question"], strict=True)
    ]
    letters = {"yes": "A", "no": "B", "maybe": "C"}
    gold = [letters.get(str(decision).strip().lower(), decision) for decision in table["final_decision"]]
    options = [{letter: decision for decision, letter in letters.items()} for _ in asked]
    return pd.DataFrame({"question": asked, "options": options, "gold": gold, "stem": table["question"]})


def _context(cell: Any) -> str:
    if isinstance(cell, dict):
        cell = cell.get("contexts", "")
    if isinstance(cell, Iterable) and not isinstance(cell, str):
        return "\n".join(map(str, cell))
    return _text(cell)


def _text(cell: Any) -> str:
    return "" if cell is None or cell != cell else str(cell).strip()


def _check(items: pd.DataFrame, source: str) -> pd.DataFrame:
    """The items as they are; raises DataError with the first that is not as it should be."""
    for item in items.itertuples():
        options = item.options
        if not isinstance(item.question, str) or not item.question.strip():
            raise DataError(f"{source}, item {item.id}: the question is empty.")
        letters = list(options) if isinstance(options, dict) else []
        if len(letters) < 2 or not all(isinstance(key, str) and re.fullmatch("[A-Z]", key) for key in letters):
            raise DataError(f"{source}, item {item.id}: options must map at least two letters to texts.")
        if not isinstance(item.gold, str) or item.gold not in options:
            found = f"the right letter {item.gold!r} is not among {', '.join(options)}"
            raise DataError(f"{source}, item {item.id}: {found}.")
    if items["id"].isna().any() or items["id"].isin(["", "nan", "None"]).any():
        raise DataError(f"{source}: some items have an id and others have none; give every item one, or none.")
    if items["id"].duplicated().any():
        raise DataError(f"{source}: the id {items.loc[items['id'].duplicated(), 'id'].iloc[0]} occurs twice.")
    return items
