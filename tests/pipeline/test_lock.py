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
from utils.pipeline.lock import release_lock, take_lock
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
    with pytest.raises(RunDirError, match=rf"run is in use by 03_lora_training \(process {holder.pid}, since .*\); wait"):  # fmt: skip
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


def test_the_same_process_takes_it_as_often_as_it_likes_and_only_who_took_it_first_lets_go(tmp_path):
    for owner in ("driver", "00_setup", "00_setup"):
        take_lock(tmp_path, owner)
    release_lock(tmp_path, "00_setup")
    release_lock(tmp_path, "never taken")
    assert is_locked(tmp_path)
    release_lock(tmp_path, "driver")
    assert not is_locked(tmp_path)


PROBE = "import sys; from pathlib import Path; from utils.pipeline.lock import take_lock; take_lock(Path(sys.argv[1]), 'probe', 0)"


def tried(run_dir, *before: str) -> bool:
    """Whether a process of ours, started by `before`, is kept out."""
    command = [*before, sys.executable, "-c", PROBE, str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "RunDirError" in done.stderr, done.stderr
    return done.returncode != 0


def is_locked(run_dir) -> bool:
    """Whether somebody has the lock, whoever asks: a process below the holder would be let in."""
    with (run_dir / lock.FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_process_below_the_holder_needs_no_lock_of_its_own(tmp_path):
    take_lock(tmp_path, "driver")
    assert not tried(tmp_path) and not tried(tmp_path, "env")  # however deep
    release_lock(tmp_path, "driver")


def test_what_a_dead_machine_left_blocks_nobody_and_lets_nobody_in(holder, tmp_path):
    run = tmp_path / "run"
    signature = json.loads((run / ".lock.json").read_text())
    (run / ".lock.json").write_text(json.dumps(signature | {"pid": os.getpid(), "created": 0}))  # another boot's
    with pytest.raises(RunDirError):
        take_lock(run, "second", wait_s=0.2)
    holder.kill()
    holder.wait()
    take_lock(run, "second", wait_s=0.2)
    release_lock(run, "second")


def without_flock(monkeypatch, number, refused) -> None:
    real = fcntl.flock

    def flock(file, operation):
        descriptor = file if isinstance(file, int) else file.fileno()
        if refused(str(Path(f"/proc/self/fd/{descriptor}").readlink())):
            raise OSError(number, os.strerror(number))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_the_file_system_knows_no_locks_scratch_stands_in(tmp_path, monkeypatch, number):
    monkeypatch.setattr(lock.tempfile, "gettempdir", lambda: str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text("left by a machine that died")
    without_flock(monkeypatch, number, lambda name: str(run) in name)
    take_lock(run, "first")
    stand_in = next(tmp_path.glob("*.lock"))
    with stand_in.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    release_lock(run, "first")
    with stand_in.open() as other:
        fcntl.flock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunDirError, match=r"run cannot be written .*; choose another RUN_DIR"):
        take_lock(tmp_path / "run", "first")


def test_waiting_ends_after_the_time_that_was_given(holder, tmp_path):
    started = time.monotonic()
    with pytest.raises(RunDirError):
        take_lock(tmp_path / "run", "second", wait_s=0.3)
    assert time.monotonic() - started < 2
