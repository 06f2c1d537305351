"""One run directory, one run at a time; what blocks is a living process, and it is named."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.errors import RunDirError
from utils.pipeline import lock
from utils.pipeline.lock import hand_on, release_lock, take_lock
from utils.project import ROOT

HOLD = "import sys, time; from pathlib import Path; from utils.pipeline.lock import take_lock; take_lock(Path(sys.argv[1]), '03_lora_training'); print('held', flush=True); time.sleep(60)"  # fmt: skip


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_told_in_one_sentence_who_is_at_work(holder, tmp_path):
    with pytest.raises(RunDirError, match=rf"run is in use by 03_lora_training \(process {holder.pid} on .*, since .*\); wait"):  # fmt: skip
        take_lock(tmp_path / "run", "second", wait_s=0.2)


def test_a_killed_holder_blocks_nobody(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    take_lock(tmp_path / "run", "second", wait_s=0.2)
    release_lock(tmp_path / "run", "second")


def test_one_that_is_about_to_die_is_waited_for(holder, tmp_path):
    threading.Timer(0.5, holder.kill).start()
    take_lock(tmp_path / "run", "second")
    release_lock(tmp_path / "run", "second")


def test_a_copy_of_a_directory_that_is_in_use_is_free(holder, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    take_lock(tmp_path / "copy", "second", wait_s=0.2)
    release_lock(tmp_path / "copy", "second")


def test_the_same_process_takes_it_as_often_as_it_likes_and_the_last_owner_lets_go(tmp_path):
    first = take_lock(tmp_path, "driver")
    assert take_lock(tmp_path, "00_setup") == first == take_lock(tmp_path, "00_setup")
    release_lock(tmp_path, "00_setup")
    release_lock(tmp_path, "never taken")
    assert is_locked(tmp_path)
    release_lock(tmp_path, "driver")
    assert not is_locked(tmp_path)


def is_locked(run_dir, **options) -> bool:
    code = "import sys; from pathlib import Path; from utils.pipeline.lock import take_lock; take_lock(Path(sys.argv[1]), 'probe', 0)"
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], cwd=ROOT, capture_output=True, text=True, check=False, **options)  # fmt: skip
    assert done.returncode == 0 or "RunDirError" in done.stderr, done.stderr
    return done.returncode != 0


def test_a_process_to_which_it_was_handed_on_is_let_in_and_keeps_it_when_its_parent_lets_go(tmp_path):
    handed = hand_on(take_lock(tmp_path, "driver"))
    assert not is_locked(tmp_path, **handed) and is_locked(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **handed)
    release_lock(tmp_path, "driver")
    assert is_locked(tmp_path)
    child.kill()
    child.wait()
    assert not is_locked(tmp_path)


def test_a_variable_without_its_descriptor_lets_nobody_in(tmp_path):
    take_lock(tmp_path, "driver")
    assert is_locked(tmp_path, env={**os.environ, lock.VARIABLE: "99"})
    release_lock(tmp_path, "driver")


def without_flock(monkeypatch, refused) -> None:
    real = fcntl.flock

    def flock(descriptor, operation):
        if refused(str(Path(f"/proc/self/fd/{descriptor}").readlink())):
            raise OSError(errno.ENOLCK, "No locks available")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def test_where_the_file_system_knows_no_locks_scratch_stands_in(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.tempfile, "gettempdir", lambda: str(tmp_path))
    run = tmp_path / "run"
    without_flock(monkeypatch, lambda name: str(run) in name)
    handed = hand_on(take_lock(run, "first"))
    assert handed
    with (
        (tmp_path / next(file.name for file in tmp_path.glob("*.lock"))).open() as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.setenv(lock.VARIABLE, handed["env"][lock.VARIABLE])
    assert lock._is_handed_on(run)
    monkeypatch.delenv(lock.VARIABLE)
    release_lock(run, "first")


def test_where_nothing_can_be_locked_the_run_goes_on(tmp_path, monkeypatch):
    without_flock(monkeypatch, lambda name: True)
    assert take_lock(tmp_path, "first") is None and hand_on(None) == {}
    release_lock(tmp_path, "first")


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunDirError, match=r"run cannot be written .*; choose another RUN_DIR"):
        take_lock(tmp_path / "run", "first")


class Notebook:
    """A kernel's shell in a process of its own, which executes one cell after the other."""

    CODE = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="nocolor")
print("READY", flush=True)
for line in sys.stdin:
    shell.run_cell(json.loads(line))
    print("READY", flush=True)
"""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.said()

    def said(self) -> str:
        return "".join(iter(self.process.stdout.readline, "READY\n"))

    def run(self, cell: str) -> str:
        """Execute `cell`; what it said."""
        self.process.stdin.write(json.dumps(cell) + "\n")
        self.process.stdin.flush()
        return self.said()


@pytest.fixture
def notebook():
    made = Notebook()
    yield made
    made.process.kill()
    made.process.wait()


def taken(run_dir: Path) -> str:
    return f"from utils.pipeline.lock import *; from pathlib import Path; run = Path({str(run_dir)!r}); _ = take_lock(run, '01', 0)"


def test_a_cell_that_failed_lets_others_in_and_the_next_one_asks_again(notebook, tmp_path):
    """An idle kernel is alive: without this, a stage that failed by hand would keep everybody out until it is shut down."""
    notebook.run(taken(tmp_path))
    seen = [is_locked(tmp_path)]
    for cell in ("1 / 0", "1", "1 / 0"):
        notebook.run(cell)
        seen.append(is_locked(tmp_path))
    assert seen == [True, False, True, False]


def test_a_notebook_that_is_done_asks_no_more_whatever_fails_in_it(notebook, tmp_path):
    for _ in range(2):
        notebook.run(taken(tmp_path))
    notebook.run("release_lock(run, '01')")
    for cell in ("1 / 0", "1"):
        notebook.run(cell)
        assert not is_locked(tmp_path)
    assert notebook.run("print(get_ipython().events.callbacks)").count("_follow_cells") == 0


def test_a_notebook_that_let_go_after_a_failed_cell_asks_no_more(notebook, tmp_path):
    notebook.run(taken(tmp_path))
    notebook.run("1 / 0")
    notebook.run(f"{taken(tmp_path)}; release_lock(run, '01'); 1 / 0")  # an opening that is refused
    for cell in ("1", "1 / 0", "1"):
        notebook.run(cell)
        assert not is_locked(tmp_path)


def test_however_often_it_is_opened_there_is_one_who_asks(notebook, tmp_path):
    for _ in range(3):
        notebook.run(taken(tmp_path))
        notebook.run("1 / 0")
    assert notebook.run("print(get_ipython().events.callbacks)").count("_follow_cells") == 2


def test_every_cell_is_told_while_another_process_is_at_work(notebook, tmp_path):
    notebook.run(taken(tmp_path / "run"))
    notebook.run("1 / 0")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    told = [notebook.run("1") for _ in range(3)]
    holder.kill()
    holder.wait()
    assert all(f"is in use by 03_lora_training (process {holder.pid}" in text for text in told)
    assert "in use" not in notebook.run("1") and is_locked(tmp_path / "run")


def test_nothing_stays_open_where_nothing_can_be_locked(tmp_path, monkeypatch):
    without_flock(monkeypatch, lambda name: True)
    before = set(Path("/proc/self/fd").iterdir())
    take_lock(tmp_path, "first")
    release_lock(tmp_path, "first")
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_waiting_ends_after_the_time_that_was_given(holder, tmp_path):
    started = time.monotonic()
    with pytest.raises(RunDirError):
        take_lock(tmp_path / "run", "second", wait_s=0.3)
    assert time.monotonic() - started < 2
