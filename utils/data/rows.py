"""Rows: read, checked, and written once they are split.

A row has Question, Complex_CoT and Response, under these names, under those of data.columns, or as a chat; `answer` and
`choices` (texts, of which it is one) where a rule can check it, as in the demo; and `group`, which rows share that depend on each other.
"""

import hashlib
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.data.hub import load_hub_table
from utils.data.near_duplicates import normalise
from utils.errors import DataError
from utils.files import atomic, is_there, parse_json, write_json, write_text
from utils.schema import DataSection

COLUMNS = ("Question", "Complex_CoT", "Response")
_CHECKED = ("answer", "choices")
_REASONING = COLUMNS[1]
_CHATS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_DEFAULT = DataSection()


def read_table(path: Path, setting: str = "data.path", columns: tuple[str, ...] = COLUMNS) -> pd.DataFrame:
    """A local JSONL, JSON, CSV or Parquet file as it stands; `setting` and `columns` are for DataError's messages."""
    expected = f"expected rows with {', '.join(columns)}"
    if not is_there(path) or not path.is_file():
        raise DataError(f"There is no data file {path}; check {setting}, or empty it (--set {setting}=).")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name} ends in {path.suffix or 'nothing'}; expected one of {', '.join(_READERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path.name} is empty; {expected}.")
    try:
        frame = reader(path)
    except Exception as error:  # pyarrow and pandas have a type for each kind of damage
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path.name} is not {path.suffix.lstrip('.').upper()}: {reason}. Mend or rename it.") from None
    if len(frame) == 0:
        raise DataError(f"{path.name} holds no rows; {expected}.")
    return frame


def load_rows(config: DataSection) -> tuple[pd.DataFrame, list[dict]]:
    """(checked rows of a local file or a Hub data set with their place in it as `row`, entries of those dropped).

    A row that cannot be used is dropped from the Hub's, which nobody here can mend; in a local file it is a DataError.
    """
    if config.path is not None:
        rows = check_rows(read_table(config.path), config.path.name, config)
        return rows.assign(row=rows.index + 1), []
    table = load_hub_table(config.name, config.subset, config.revision, "train", "data.path")
    rows, problems = convert_rows(table, config.name, config)
    if len(problems) == len(rows):
        raise DataError(f"{config.name} has no row that can be used: in the first, {problems[0]}; take other data.")
    dropped = [{"row": position + 1, "reason": reason} for position, reason in sorted(problems.items())]
    rows = rows.drop(index=list(problems))
    return _tidy(rows).assign(row=rows.index + 1), dropped


def check_rows(table: pd.DataFrame, source: str, data: DataSection = _DEFAULT) -> pd.DataFrame:
    """The table's rows as `convert_rows` reads them, string cells stripped and with an `id` from the question's text.

    Raises DataError where a column is missing, and for the first row that cannot be used.
    """
    rows, problems = convert_rows(table, source, data)
    for position, reason in sorted(problems.items()):
        raise DataError(f"{source}, row {position + 1}: {reason}; mend that row, or take it out.")
    return _tidy(rows)


def convert_rows(table: pd.DataFrame, source: str, data: DataSection) -> tuple[pd.DataFrame, dict[int, str]]:
    """(the table with Question, Complex_CoT and Response, {position of a row that cannot be used: why}).

    Columns are renamed as data.columns says. Without them, `messages` (role, content) or `conversations` (from, value) of
    one turn are read. Without a column of its own the reasoning is what stands in the response's think block.
    """
    rows, problems = _rename(table, source, data.columns), {}
    chat = next((name for name in _CHATS if name in rows.columns), None)
    if chat and not {"Question", "Response"} & set(rows.columns):
        rows, problems = read_chats(rows, chat, source)
    missing = [column for column in ("Question", "Response") if column not in rows.columns]
    if not missing and _REASONING not in rows.columns:
        blocks, answers = zip(*map(_split_think_block, rows["Response"]), strict=True)
        rows = rows.assign(**{_REASONING: blocks, "Response": answers})
        missing = [_REASONING] if data.reasoning == "required" and not any(blocks) and not problems else []
    if missing == [_REASONING] and chat:
        found = f"{source} has no answer with a <think>…</think> block in {chat}, expected the reasoning there"
        raise DataError(f"{found}; data.reasoning=optional takes rows without.")
    if missing:
        found = f"{source} lacks the column(s) {', '.join(missing)}; it has {', '.join(map(str, table.columns))}"
        name = "Name yours by data.columns (data.columns.Question=prompt)"
        raise DataError(f"{found}. {name}; data.reasoning=optional takes rows without reasoning.")
    for column in ("Question", "Response", _REASONING):
        for position, cell in enumerate(rows[column]):
            if reason := _find_fault(column, cell, data.reasoning):
                problems.setdefault(position, f"{data.columns.get(column, column)} {reason}")
    return rows, problems


def read_chats(rows: pd.DataFrame, chat: str, source: str) -> tuple[pd.DataFrame, dict[int, str]]:
    """(Question and Response in place of the column `chat`, {position: why a row cannot be used}).

    One system message that all rows share is left out, and said: the prompt of this series has no place for it.
    """
    turns, problems, systems = [], {}, set()
    for position, cell in enumerate(rows[chat]):
        try:
            system, question, response = _read_turn(cell)
            systems |= {system} - {None, ""}
        except ValueError as error:
            problems[position], (question, response) = f"{chat} {error}", ("", "")
        turns.append({"Question": question, "Response": response})
    if len(systems) > 1:
        found = f"{source} has {len(systems)} different system messages in {chat}, expected none or one for all"
        raise DataError(f"{found}; put what they say into the user's messages.")
    for system in systems:
        print(f"{source}: the system message {system[:80]!r} is left out; put it into the user's messages.")
    return rows.drop(columns=chat).join(pd.DataFrame(turns)), problems


def _read_turn(cell: Any) -> tuple[str | None, Any, Any]:
    """(system message, question, response) of one conversation; raises ValueError, in words, unless it is one turn."""
    try:
        messages = parse_json(cell) if isinstance(cell, str) else cell
    except ValueError:
        messages = None
    if not isinstance(messages, (list, np.ndarray)) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("is no list of messages")
    said = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in messages]
    roles = [_ROLES.get(str(role), str(role)) for role, _ in said]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"has the turns {', '.join(roles) or 'of nobody'}, expected one of user and assistant")
    if len(said) == 3 and not isinstance(said[0][1], (str, type(None))):
        raise ValueError("has a system message that is no text")
    return said[0][1] if len(said) == 3 else None, said[-2][1], said[-1][1]


def _split_think_block(response: Any) -> tuple[str, Any]:
    """(reasoning, answer) of an assistant's text; without a closed think block all of it is the answer."""
    before, closed, after = response.partition("</think>") if isinstance(response, str) else ("", "", "")
    if not closed:
        return "", response
    return before.strip().removeprefix("<think>").strip(), after


def _rename(table: pd.DataFrame, source: str, columns: Mapping[str, str]) -> pd.DataFrame:
    """`table` with its columns called as the series does; `columns` maps the series' names to the table's."""
    for field, theirs in columns.items():
        if theirs not in table.columns:
            has = ", ".join(map(str, table.columns))
            raise DataError(f"{source} has no column {theirs!r}, which data.columns.{field} names; it has {has}.")
    picked = {field: table[theirs] for field, theirs in columns.items()}
    return table.drop(columns=set(columns.values())).assign(**picked).reset_index(drop=True)


def _find_fault(column: str, cell: Any, reasoning: str) -> str | None:
    """Why a row with this cell cannot be used; None where it can."""
    if _is_blank(cell):
        required = "is empty, and data.reasoning is required" if reasoning == "required" else None
        return required if column == _REASONING else "is empty"
    if not isinstance(cell, str):
        return f"holds a {type(cell).__name__}, expected text"
    if column != "Question" and ("<think>" in cell or "</think>" in cell):
        return "holds a <think> or </think> that is not one closed block before the answer"
    return None


def _tidy(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that can be used, cells stripped and with an `id` from the question's text; no columns that nobody reads."""
    checked = _CHECKED if set(_CHECKED) <= set(rows.columns) else ()
    rows = rows[[name for name in (*COLUMNS, *checked, "group") if name in rows.columns]].reset_index(drop=True)
    if checked:
        pairs = zip(rows["answer"], map(_texts, rows["choices"]), strict=True)
        named = [(one, of) if isinstance(one, str) and one in of else (None, None) for one, of in pairs]
        rows["answer"], rows["choices"] = zip(*named, strict=True)
    for column in COLUMNS:
        rows[column] = ["" if _is_blank(cell) else cell.strip() for cell in rows[column]]
    if "group" in rows.columns:
        rows["group"] = [None if _is_blank(group) else str(group) for group in rows["group"]]
    rows["id"] = [hashlib.sha256(normalise(question).encode()).hexdigest()[:12] for question in rows["Question"]]
    return rows


def _texts(cell: Any) -> list[str]:
    """A list of texts, or such a list as JSON text (in a CSV); empty for anything else."""
    with suppress(ValueError):
        cell = parse_json(cell) if isinstance(cell, str) else cell
    return list(cell) if isinstance(cell, (list, np.ndarray)) and all(isinstance(t, str) for t in cell) else []


def write_split(directory: Path, parts: dict[str, pd.DataFrame], benchmark: pd.DataFrame | None, report: dict) -> None:
    """{name}.parquet of each part, benchmark.jsonl (empty without one), anecdote.json and split.json, each atomically.

    A part without rows leaves no file. anecdote.json is the tutorials' example row, which is in no part; {} where the data
    have no such row.
    """
    for name, frame in parts.items():
        (directory / f"{name}.parquet").unlink(missing_ok=True)
        if len(frame):
            write_frame(directory / f"{name}.parquet", frame)
    items = "" if benchmark is None else benchmark.to_json(orient="records", lines=True, force_ascii=False)
    write_text(directory / "benchmark.jsonl", items)
    write_json(directory / "anecdote.json", report.get("tutorial_question", {}))
    write_json(directory / "split.json", report)


def read_benchmark(directory: Path) -> pd.DataFrame | None:
    """The items that `write_split` froze, or None where the run has no benchmark."""
    path = directory / "benchmark.jsonl"
    try:
        return _read_jsonl(path) if path.stat().st_size else None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); run 00_setup again, which writes it.") from None


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """A Parquet file, written atomically."""
    with atomic(path) as scratch:
        frame.to_parquet(scratch, index=False)


def _is_blank(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and cell != cell)


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, partitioning=None)  # or a folder named a=b would be a column
    table.validate(full=True)  # pandas would find text that is no UTF-8 only when it is used
    return table.to_pandas()


def _read_json(path: Path) -> pd.DataFrame:
    """A list of objects, or one object of them by their id, as PubMedQA's own file is."""
    rows = parse_json(path.read_text(encoding="utf-8-sig"))
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = [{"id": name, **row} for name, row in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, one for each row")
    return pd.DataFrame(rows)


def _read_csv(path: Path) -> pd.DataFrame:
    """Cells as they are written, "None" and "007" too; a row with a cell too many is an error and moves no column."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON object") from error
        if row is not None and not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        rows += [] if row is None else [row]
    return pd.DataFrame(rows)


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
