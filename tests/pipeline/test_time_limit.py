"""When a session has to end: arithmetic on hours, with nothing to wait for."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.pipeline import time_limit as deadline
from utils.pipeline.time_limit import RESERVE_S, Deadline, session_started
from utils.project import ROOT

HOURS = st.floats(min_value=0.01, max_value=100)


def test_eight_hours_end_ten_minutes_early():
    eight = Deadline(started=0.0, max_hours=8)
    assert not eight.is_due(now=8 * 3600 - RESERVE_S - 1) and eight.is_due(now=8 * 3600 - RESERVE_S)
    assert eight.is_due(now=7 * 3600, next_s=3600) and not eight.is_due(now=7 * 3600, next_s=2999)


def test_without_a_limit_it_is_never_due():
    never = Deadline(started=0.0)
    assert not never.is_due(now=1e12, next_s=1e9)


@given(hours=HOURS, spent=st.floats(min_value=0, max_value=200), step=st.floats(min_value=0, max_value=36_000))
def test_what_is_due_stays_due_and_so_does_longer_work(hours, spent, step):
    limit = Deadline(started=1e9, max_hours=hours)
    now = 1e9 + 3600 * spent
    assert limit.is_due(now + 60, step) >= limit.is_due(now, step) >= limit.is_due(now)
    assert limit.is_due(1e9 + 3600 * hours - RESERVE_S - step + 0.01, step)
    assert not limit.is_due(1e9 + 3600 * hours - RESERVE_S - step - 0.01, step)


def test_a_short_session_keeps_a_tenth_in_reserve(monkeypatch):
    monkeypatch.setattr(deadline, "session_started", lambda: 1000.0)
    assert Deadline.of(0.01) == Deadline(1000.0, 0.01, pytest.approx(3.6))
    assert Deadline.of(8).reserve_s == RESERVE_S and Deadline.of(None).max_hours is None


def test_the_sentence_has_both_numbers():
    assert Deadline(0.0, 8).sentence(now=7.9 * 3600) == "this session is 7.9 h old and hardware.max_hours is 8"


def test_a_kernel_counts_from_its_driver_and_a_notebook_opened_by_hand_from_itself(tmp_path):
    child = "from utils.pipeline.time_limit import session_started; print(repr(session_started()))"
    started = f"""
import runpy, subprocess, sys, time, psutil
if len(sys.argv) > 1:  # as `python -m utils run` starts
    time.sleep(0.2)
    print(repr(psutil.Process().create_time()))
    print(subprocess.run([sys.executable, "-c", {child!r}], cwd={str(ROOT)!r}, capture_output=True, text=True, check=True).stdout)
"""
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__main__.py").write_text(started)
    command = [sys.executable, "-m", "utils", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    driver, kernel = map(float, done.stdout.split())
    assert kernel == pytest.approx(driver, abs=0.1)
    assert session_started() == pytest.approx(psutil.Process().create_time())


@pytest.mark.parametrize("place", ["kaggle", "colab"])
def test_on_a_platform_the_session_is_as_old_as_its_machines_first_process(monkeypatch, place):
    monkeypatch.setattr(deadline, "where", lambda: place)
    assert session_started() == pytest.approx(psutil.Process(1).create_time())
    assert session_started() <= time.time()
