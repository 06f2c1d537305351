"""Processes of ours end with us, whatever they are and however we end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from utils.processes import Child
from utils.project import ROOT, python_path

STARTS_ANOTHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""

IGNORES = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(60)
"""
STARTS_WHAT_IGNORES = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {IGNORES!r}], start_new_session=True)
time.sleep(60)
"""


def wait_for_pid(log: Path) -> int:
    for _ in range(200):
        if log.exists() and (text := log.read_text().strip()):
            return int(text.splitlines()[0])
        time.sleep(0.05)
    raise AssertionError("the command never said who it started")


def is_gone(pid: int, within_s: float = 10.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("command, status", [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_child_tells_its_exit_status_and_its_last_words(tmp_path, command, status):
    with Child([sys.executable, "-c", f"print('so long', flush=True); {command}"], tmp_path / "log") as child:
        assert child.wait(20) == status
    assert child.last_words() == "so long"


def test_leaving_the_block_ends_the_command_and_what_it_started(tmp_path):
    with Child([sys.executable, "-c", STARTS_ANOTHER], tmp_path / "log") as child:
        grandchild = wait_for_pid(tmp_path / "log")
    assert child.poll() is not None and is_gone(grandchild)


def test_a_child_that_is_asked_to_stop_may_come_to_a_good_end(tmp_path):
    listens = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print(1, flush=True); time.sleep(60)"
    )
    with Child([sys.executable, "-c", listens], tmp_path / "log") as child:
        wait_for_pid(tmp_path / "log")
        child.ask_to_stop()
        assert child.wait(20) == 7


def test_a_parent_that_is_killed_leaves_nothing_behind(tmp_path):
    parent = f"""
import sys, time
from pathlib import Path
from utils.processes import Child
child = Child([sys.executable, "-c", {STARTS_ANOTHER!r}], Path({str(tmp_path / "log")!r}))
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, env={"PYTHONPATH": python_path()})
    grandchild = wait_for_pid(tmp_path / "log")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert is_gone(grandchild)


@pytest.mark.parametrize("way", ["left", "asked to stop"])
def test_what_ignores_the_request_to_end_goes_with_the_command_that_does_not(tmp_path, way):
    with Child([sys.executable, "-c", STARTS_WHAT_IGNORES], tmp_path / "log") as child:
        grandchild = wait_for_pid(tmp_path / "log")
        if way == "asked to stop":
            child.ask_to_stop()
            assert child.wait(20) == 128 + signal.SIGTERM
    assert is_gone(grandchild, within_s=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("source", [STARTS_ANOTHER, STARTS_WHAT_IGNORES])
def test_a_command_that_is_killed_leaves_nothing_behind(tmp_path, source, number):
    with Child([sys.executable, "-c", source], tmp_path / "log") as child:
        grandchild = wait_for_pid(tmp_path / "log")
        time.sleep(1.5)  # it is looked for twice a second
        psutil.Process(grandchild).parent().send_signal(number)
        assert child.wait(20) == 128 + number
    assert is_gone(grandchild, within_s=1)


def test_no_half_of_a_secret_is_among_the_last_words(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", key := "c0ffee" * 7)
    with Child([sys.executable, "-c", f"print('x' * 280 + ' {key}')"], tmp_path / "log") as child:
        assert child.wait(20) == 0
    assert child.last_words() == "x" * 280 + " ***"


@pytest.mark.parametrize(
    ("words", "executed"),
    [(("notebook.ipynb", "out.ipynb"), True), (("--port=9000",), False)],
    ids=["papermill", "a Jupyter server"],
)
def test_a_notebook_that_papermill_runs_is_told_from_one_opened_by_hand(words, executed):
    asked = "from utils.processes import is_executed; print(is_executed())"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {asked!r}])"
    done = subprocess.run([sys.executable, "-c", parent, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(executed)
