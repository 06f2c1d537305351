"""The table itself: records of several processes become one row for each kind of fault."""

from __future__ import annotations

import json

import pytest

from tests.faults.conftest import LONG, RESULTS
from tests.faults.table import in_full, read_rows, render


def test_records_of_one_kind_are_summed_and_the_worst_loss_is_kept(record_fault, tmp_path, monkeypatch):
    monkeypatch.setenv(RESULTS, str(tmp_path))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    record_fault("kill -9", tried=2, survived=2, lost_seconds=1.5)
    record_fault("full disk", tried=3, survived=2)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    record_fault("kill -9", survived=1, lost_seconds=4.25)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert read_rows(tmp_path) == [
        {"area": "table", "kind": "full disk", "tried": 3, "survived": 2, "lost_seconds": None},
        {"area": "table", "kind": "kill -9", "tried": 3, "survived": 3, "lost_seconds": 4.25},
    ]
    text = render(read_rows(tmp_path))
    assert "5 of 6 faults survived; the most work lost to one was 4.2 s." in text
    assert "| table | full disk | 3 | 2 | none |" in text and "| table | kill -9 | 3 | 3 | 4.2 s |" in text


def test_a_fault_that_was_not_survived_is_in_the_table_too(recording, tmp_path, monkeypatch):
    monkeypatch.setenv(RESULTS, str(tmp_path))
    with recording("kill -9", tried=3) as counts:
        counts.survived += 3
    for done in (0, 2):
        with pytest.raises(AssertionError), recording("full disk") as counts:
            for _ in range(done):
                counts.tried += 1
                counts.survived += 1
            counts.tried += done > 0
            raise AssertionError
    assert [(row["kind"], row["tried"], row["survived"]) for row in read_rows(tmp_path)] == [
        ("full disk", 4, 2),  # one that failed before anything was counted is one
        ("kill -9", 3, 3),
    ]


def test_without_a_folder_nothing_is_kept(record_fault, tmp_path, monkeypatch):
    monkeypatch.delenv(RESULTS, raising=False)
    record_fault("kill -9", survived=1)
    assert json.dumps(read_rows(tmp_path)) == "[]"


def test_the_table_says_when_a_record_is_of_the_short_form(record_fault, tmp_path, monkeypatch):
    monkeypatch.setenv(RESULTS, str(tmp_path))
    monkeypatch.setenv(LONG, "1")
    record_fault("kill -9", survived=1)
    assert in_full(tmp_path) and "Written by `make faults` on" in render(read_rows(tmp_path), in_full(tmp_path))
    monkeypatch.delenv(LONG)
    record_fault("kill -9", survived=1)
    assert not in_full(tmp_path) and "CI's short form" in render(read_rows(tmp_path), in_full(tmp_path))
