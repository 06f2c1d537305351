"""Multiple-choice items of MedQA, MedMCQA and PubMedQA, from the Hub or a file, in one form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from utils.data.near_duplicates import group_duplicates, near_pairs, vectorise
from utils.data.rows import load_hub_table, read_table
from utils.errors import DataError
from utils.files import parse_json
from utils.schema import BenchmarkSection, Config, EvaluateSection

COLUMNS = ("id", "benchmark", "question", "options", "gold", "group", "stem")
_KNOWN = ("medmcqa", "pubmedqa", "medqa")
_MEDQA = ("question", "options", "answer_idx")
_MEDMCQA = ("question", "opa", "opb", "opc", "opd", "cop")
_PUBMEDQA = ("question", "final_decision")


def load_benchmarks(evaluate: EvaluateSection) -> pd.DataFrame | None:
    """The drawn items of all benchmarks, or None where none is named.

    Columns: id (unique; `name:` comes before it in all but the first benchmark), benchmark (its name), question (as it
    is asked), options (dict of letter to text), gold (a letter), group (near duplicates share one; otherwise the id) and
    stem (the question alone, without PubMedQA's abstract: what near duplicates are compared by). As many items as `rows`
    asks for are drawn by evaluate.seed, in the order of the file.

    Raises DataError for another schema, an empty question, fewer than two options, a gold letter that is not among
    them, duplicate ids, or more items asked for than there are.
    """
    frames: list[pd.DataFrame] = []
    for section in evaluate.benchmarks:
        key = "evaluate.benchmark" if section is evaluate.benchmark else "evaluate.more_benchmarks"
        table, source = _read(section, key)
        items = _check(_convert(table, source, section.split), source)
        if section.rows > len(items):
            raise DataError(f"{key}.rows asks for {section.rows} items; {source} has {len(items)}.")
        chosen = np.sort(np.random.default_rng(evaluate.seed).permutation(len(items))[: section.rows])
        items = items.iloc[chosen].reset_index(drop=True)
        items["benchmark"] = _free_name(_name(section, table), {frame["benchmark"].iloc[0] for frame in frames})
        if frames:
            items["id"] = items["benchmark"] + ":" + items["id"]
        frames.append(items)
    if not frames:
        return None
    together = pd.concat(frames, ignore_index=True)
    together["group"] = _group(together)
    return together[list(COLUMNS)]


def load_items(section: BenchmarkSection) -> pd.DataFrame:
    """All items of one benchmark, for the letter probe: id, question, options and gold; raises as `load_benchmarks`."""
    table, source = _read(section, "evaluate.benchmark")
    return _check(_convert(table, source, section.split), source)[["id", "question", "options", "gold"]]


def describe_primary(config: Config) -> str:
    """The primary metric in words, and why it is not the profile's benchmark where the rows are the reader's own."""
    names = {"accuracy": "accuracy by rule", "multiple_choice": "multiple-choice accuracy", "nll": "held-out loss"}
    text = f"primary metric: {names[config.evaluate.primary]}"
    if config.evaluate.primary == "nll" and config.data.path is not None and config.evaluate.benchmark.wanted:
        beside = config.evaluate.benchmark.path or config.evaluate.benchmark.name
        text += f" on {config.data.path.name}; {beside} is measured beside it, evaluate.primary=multiple_choice puts it first"
    return text


def _read(section: BenchmarkSection, key: str) -> tuple[pd.DataFrame, str]:
    """(the table as it is stored, what to call it in messages)."""
    if section.path is not None:
        return read_table(section.path, f"{key}.path", _MEDQA), section.path.name
    name = str(section.name)
    return load_hub_table(name, section.subset, section.revision, section.split, f"{key}.path"), name


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
        raise DataError(
            f"{source} lacks {', '.join(missing)}; expected question, options and answer_idx (MedQA), question, opa to "
            "opd and cop (MedMCQA), or question, context and final_decision (PubMedQA)."
        )
    ids = next((table[column].astype(str) for column in ("id", "pubid") if column in columns), None)
    items.insert(0, "id", [f"{split}-{i}" for i in range(len(items))] if ids is None else ids.to_numpy())
    if "stem" not in items:
        items["stem"] = items["question"]
    return items


def _options(cell: Any) -> Any:
    """{letter: text} from a dict, a list of {key, value}, or either as JSON text (in a CSV); empty ones fall away."""
    if isinstance(cell, str):
        try:
            cell = parse_json(cell)
        except ValueError:
            return cell
    if isinstance(cell, (list, np.ndarray)) and all(isinstance(o, dict) and {"key", "value"} <= set(o) for o in cell):
        cell = {option["key"]: option["value"] for option in cell}
    if not isinstance(cell, dict):
        return cell
    return {key: _text(text) for key, text in cell.items() if _text(text)}


def _from_medmcqa(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """The right option counts from 0 on the Hub and from 1 in the original files; a 0 or a 4 somewhere tells which."""
    try:
        right = [_whole_number(cell) for cell in table["cop"]]
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{source}: cop must be a whole number, the right option's place (MedMCQA).") from None
    values = set(right)
    if -1 in values:
        raise DataError(f"{source} has items without a right option (cop is -1); take MedMCQA's split validation.")
    if (0 in values) == (4 in values) or not values <= set(range(5)):
        raise DataError(
            f"{source}: cop holds {', '.join(map(str, sorted(values)))}, so it cannot be told whether it counts from 0 "
            "(the Hub) or from 1 (the original files); expected 0 to 3, or 1 to 4, over the whole file."
        )
    letters = "ABCD" if 0 in values else " ABCD"
    options = [_options(dict(zip("ABCD", cells, strict=True))) for cells in table[list(_MEDMCQA[1:5])].to_numpy()]
    return pd.DataFrame({"question": table["question"], "options": options, "gold": [letters[i] for i in right]})


def _whole_number(cell: Any) -> int:
    """Not by int() alone, which makes 1 of 1.9 and of True: another option would count as the right one."""
    if isinstance(cell, (bool, np.bool_)) or not float(cell).is_integer():
        raise ValueError(f"{cell!r} is no whole number")
    return int(float(cell))


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
            raise DataError(
                f"{source}, item {item.id}: the right letter {item.gold!r} is not among {', '.join(options)}."
            )
    if items["id"].isna().any() or items["id"].isin(["", "nan", "None"]).any():
        raise DataError(f"{source}: some items have an id and others have none; give every item one, or none.")
    if items["id"].duplicated().any():
        raise DataError(f"{source}: the id {items.loc[items['id'].duplicated(), 'id'].iloc[0]} occurs twice.")
    return items


def _name(section: BenchmarkSection, table: pd.DataFrame) -> str:
    """medqa, medmcqa or pubmedqa by the name or by columns that only they have; otherwise the file's or data set's."""
    own = section.path.stem if section.path is not None else str(section.name).rsplit("/", 1)[-1]
    columns = {str(column).lower() for column in table.columns}
    folded = own.lower().replace("-", "").replace("_", "")
    for name, telling in zip(_KNOWN, ({"opa", "cop"}, {"final_decision"}, None), strict=True):
        if name in folded or (telling and telling <= columns):
            return name
    return own


def _free_name(name: str, taken: set[str]) -> str:
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _group(items: pd.DataFrame) -> list[str]:
    """The id of the first item of those that are near duplicates of each other."""
    pairs = near_pairs(vectorise(list(items["stem"])))
    numbers = group_duplicates(len(items), (pairs.left, pairs.right))
    first: dict[int, str] = {}
    for number, item_id in zip(numbers, items["id"], strict=True):
        first.setdefault(number, item_id)
    return [first[number] for number in numbers]
