"""state.json: written whole, read or None."""

from __future__ import annotations

import json

import pytest

from utils.pipeline.run_dir import STATE, SeriesState, read_state, write_state


def test_what_was_written_is_read(tmp_path):
    state = SeriesState(state="continue", stage="03_lora_training", kind="SessionOver", sentence="8 h", steps=150)
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state


def test_where_there_is_no_run_directory_nothing_is_made(tmp_path):
    write_state(tmp_path / "none", SeriesState(state="running"))
    assert not (tmp_path / "none").exists() and read_state(tmp_path / "none") is None


def test_a_state_of_a_version_that_sealed_it_is_read(tmp_path):
    old = {"state": "done", "stage": "", "kind": "", "sentence": "", "steps": 3, "left_in_scratch": {}, "seal": "0f1e"}
    (tmp_path / STATE).write_text(json.dumps(old))
    assert read_state(tmp_path) == SeriesState(state="done", steps=3)


@pytest.mark.parametrize("content", [b"", b"{", b'{"state": "sleeping"}', b"\xff\xfe", b"[]"])
def test_a_state_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / STATE).write_bytes(content)
    assert read_state(tmp_path) is None
