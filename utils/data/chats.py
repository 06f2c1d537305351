"""Rows out of chats of one turn: `messages` (role, content), ShareGPT's `conversations` (from, value), and think blocks."""

from typing import Any

import numpy as np
import pandas as pd

from utils.errors import DataError
from utils.files import parse_json

CHATS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}


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


def split_think_block(response: Any) -> tuple[str, Any]:
    """(reasoning, answer) of an assistant's text; without a closed think block all of it is the answer."""
    before, closed, after = response.partition("</think>") if isinstance(response, str) else ("", "", "")
    if not closed:
        return "", response
    return before.strip().removeprefix("<think>").strip(), after
