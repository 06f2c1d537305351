"""Progress: a bar in the notebook, and a heartbeat file that the driver can read at any moment."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from utils import progress
from utils.progress import FILE, Progress, report_to, track
from utils.project import ROOT


@pytest.fixture
def heartbeat(monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "_file", None)  # put back afterwards
    (tmp_path / FILE).write_text("{}")  # as a driver that watches does
    report_to(tmp_path)
    return tmp_path / FILE


def test_the_heartbeat_is_valid_json_and_complete_at_the_end(heartbeat):
    assert list(track(range(25), "answering", unit="question")) == list(range(25))
    assert json.loads(heartbeat.read_text()) == {"description": "answering", "done": 25, "total": 25, "note": ""}
    assert [path.name for path in heartbeat.parent.iterdir()] == [heartbeat.name]


def test_the_heartbeat_is_there_from_the_first_step_with_its_note(heartbeat):
    with Progress("training", total=60) as bar:
        bar.update(note='loss 1.5 "ü"')
        state = json.loads(heartbeat.read_text())
    assert (state["done"], state["total"], state["note"]) == (1, 60, 'loss 1.5 "ü"')


def test_steps_that_follow_fast_are_written_at_the_end_only(heartbeat, monkeypatch):
    monkeypatch.setattr(progress, "_INTERVAL_S", 3600)
    with Progress("training", total=100) as bar:
        for _ in range(99):
            bar.update()
        assert json.loads(heartbeat.read_text()).get("done", 1) == 1
        bar.update()
        assert json.loads(heartbeat.read_text())["done"] == 100


def test_without_a_driver_nothing_is_written_and_the_bar_is_on_stdout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(progress, "_file", None)
    report_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert list(track((x for x in "ab"), "formatting")) == ["a", "b"]
    written = capsys.readouterr()
    assert "formatting" in written.out and written.err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_forecast_is_printed_once_after_half_a_minute_where_more_than_a_minute_is_left(monkeypatch, capsys):
    clock = iter([0.0, 29.9, 30.0, 31.0, 32.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("answering", total=100) as bar:
        bar.forecast(900.0, "too early")
        bar.forecast(59.0, "what is nearly over")
        bar.forecast(900.0, "these answers")
        bar.forecast(800.0, "again")
    said = [line for line in capsys.readouterr().out.splitlines() if "Forecast" in line]
    assert [line[line.index("Forecast") :] for line in said] == ["Forecast: about 15 min more for these answers"]


@pytest.mark.parametrize(("seconds", "words"), [(85.4, "85 s"), (90, "2 min"), (5399, "90 min"), (12_240, "3.4 h")])
def test_a_duration_is_shown_in_the_unit_that_one_would_say(seconds, words):
    assert progress.show_duration(seconds) == words


def test_an_error_in_the_work_is_passed_on_and_the_last_heartbeat_stays(heartbeat):
    with pytest.raises(RuntimeError, match="out of memory"):
        for item in track([1, 2, 3], "training"):
            if item == 2:
                raise RuntimeError("out of memory")
    assert json.loads(heartbeat.read_text())["done"] == 1


def test_a_full_disk_under_the_heartbeat_stops_nothing(heartbeat, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert list(track(range(3), "answering")) == [0, 1, 2]


def test_a_plain_process_has_no_shell_and_gets_no_ipython_and_a_notebook_its_own():
    code = """
import sys
from utils.progress import notebook_shell
assert notebook_shell() is None and "IPython" not in sys.modules
from IPython.core.interactiveshell import InteractiveShell
assert notebook_shell() is None  # imported, and no notebook
assert InteractiveShell.instance() is notebook_shell()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
