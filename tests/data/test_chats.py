"""Chats of one turn: what is no text costs a row, and never a stack trace."""

import pandas as pd
import pytest

from utils.data.rows import read_chats


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "system", "content": [{"type": "text", "text": "x"}]}, {"role": "user", "content": "q"},
         {"role": "assistant", "content": "a"}],
        [{"role": ["user"], "content": "q"}, {"role": "assistant", "content": "a"}],
    ],
)  # fmt: skip
def test_a_role_or_a_system_message_that_is_no_text_is_a_problem_of_its_row(chat):
    _, problems = read_chats(pd.DataFrame({"messages": [chat]}), "messages", "rows.jsonl")
    assert list(problems) == [0] and ("no text" in problems[0] or "expected one of user and assistant" in problems[0])
