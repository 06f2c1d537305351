"""Seals: what was written is whole, what was changed or cut off is not, and nothing is read from it."""

from __future__ import annotations

import json

import pytest

from tests.faults.fuzzing import NASTY
from utils.sealed import (
    is_whole,
    open_seal,
    read_lines,
    read_sealed,
    seal,
    split_lines,
    to_lines,
    unsealed,
    write_sealed,
)

ROWS = [{"id": "a", "text": "医\u2028🩺", "logprobs": {"A": -0.1, "B": -1e-300}}, {"id": "b", "text": "", "n": 3}]


@pytest.mark.parametrize("value", [value for value in NASTY if not isinstance(value, float)], ids=repr)
def test_what_is_sealed_is_whole_and_what_was_changed_is_not(value):
    sealed = seal({"value": value, "other": 1})
    assert is_whole(json.loads(json.dumps(sealed))) and unsealed(sealed) == {"value": value, "other": 1}
    assert not is_whole({**sealed, "other": 2}) and not is_whole(unsealed(sealed)) and not is_whole([sealed])


def test_lines_come_back_as_they_were_and_a_changed_or_torn_one_does_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_lines(path) == []
    path.write_text(to_lines(ROWS), encoding="utf-8")
    assert read_lines(path) == ROWS
    path.write_text(to_lines(ROWS).replace("-0.1", "-0.2"), encoding="utf-8")
    assert read_lines(path) == ROWS[1:]
    whole = to_lines(ROWS).encode()
    for end in range(whole.rindex(b"\n", 0, -1) + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert read_lines(path) == ROWS[:1]


def test_the_lines_that_are_not_whole_come_back_as_they_are():
    whole = to_lines(ROWS).encode()
    assert split_lines(b"") == ([], [])
    assert split_lines(whole) == (ROWS, [])
    assert split_lines(b"{}\n\n" + whole + b'{"id": "\xe5') == (ROWS, [b"{}", b'{"id": "\xe5'])


def test_what_has_no_seal_is_taken_as_it_is_and_a_seal_that_is_not_its_own_refused():
    assert open_seal({"a": 1}) == {"a": 1} == open_seal(seal({"a": 1})) and open_seal([1]) == [1]
    with pytest.raises(ValueError, match="it is not as it was written"):
        open_seal({**seal({"a": 1}), "a": 2})


def test_a_sealed_file_is_whole_or_empty(tmp_path):
    file = tmp_path / "new" / "fit.json"
    assert read_sealed(file) == {}
    write_sealed(file, ROWS[0])
    assert read_sealed(file) == ROWS[0]
    for damaged in (b"", b"[]", b"{}", file.read_bytes()[:-3], file.read_bytes().replace(b"0.1", b"0.2"), b"\xff\xfe"):
        file.write_bytes(damaged)
        assert read_sealed(file) == {}
