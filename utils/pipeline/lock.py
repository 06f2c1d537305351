"""One run directory, one run at a time: a lock that ends with the processes that hold it, however they end.

It is flock(2) on the file `.lock` in the run directory, so that what is on file never blocks anybody: only a living
process does. The driver hands its lock on to its kernels, which keep it when the driver is killed and they are not yet.
Where the file system knows no locks, a file in the machine's scratch stands in, which only this machine sees.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from utils.errors import RunDirError
from utils.progress import notebook_shell
from utils.project import NAME

FILE = ".lock"
VARIABLE = "SERIES_LOCK"  # the file descriptor by which a kernel holds its driver's lock
_WAIT_S = 5.0  # a killed driver's kernel looks once a second whether the driver is still there


@dataclass
class _Lock:
    """An open and locked file, and who in this process asked for it."""

    descriptor: int | None  # None: no file system here knows locks
    owners: set[str] = field(default_factory=set)


_held: dict[Path, _Lock] = {}
_followed: dict[tuple[Path, str], Callable[[], None]] = {}  # notebooks' work, and what ends it


def take_lock(run_dir: Path, owner: str, wait_s: float = _WAIT_S) -> int | None:
    """Lock `run_dir` for `owner`, a stage's name or a command's, until `release_lock` or the end of this process.

    Returns the file descriptor that holds the lock, None where another process's holds it for us or nothing can be
    locked. Taking it again changes nothing. Raises RunDirError, after `wait_s` seconds, where another process has it.
    """
    if _is_handed_on(run_dir):
        return None
    lock = _held.get(run_dir)
    if lock is None:
        lock = _held[run_dir] = _Lock(_lock_file(run_dir, owner, time.monotonic() + wait_s))
    lock.owners.add(owner)
    _follow_cells(run_dir, owner)
    return lock.descriptor


def release_lock(run_dir: Path, owner: str) -> None:
    """Let others in, once every owner in this process is done; nothing where `owner` has no lock."""
    if stop := _followed.pop((run_dir, owner), None):
        stop()
    _let_go(run_dir, owner)


def _let_go(run_dir: Path, owner: str) -> None:
    lock = _held.get(run_dir)
    if lock is None or owner not in lock.owners:
        return
    lock.owners.discard(owner)
    if not lock.owners:
        del _held[run_dir]
        if lock.descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(lock.descriptor, 0)
            os.close(lock.descriptor)


def hand_on(descriptor: int | None) -> dict[str, Any]:
    """What subprocess.Popen needs, to start a process that holds the same lock as long as it lives."""
    if descriptor is None:
        return {}
    return {"pass_fds": (descriptor,), "env": {**os.environ, VARIABLE: str(descriptor)}}


def _lock_file(run_dir: Path, owner: str, until: float) -> int | None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunDirError(f"{run_dir} cannot be written ({error.strerror}); choose another RUN_DIR.") from None
    with contextlib.suppress(_NoLocks):
        return _locked(descriptor, run_dir, owner, until)
    with contextlib.suppress(OSError, _NoLocks):
        descriptor = os.open(_stand_in(run_dir), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        return _locked(descriptor, run_dir, owner, until)
    return None


def _locked(descriptor: int, run_dir: Path, owner: str, until: float) -> int:
    """`descriptor` with the lock on it; closed where it gets none."""
    try:
        _wait_for(descriptor, run_dir, until)
    except BaseException:
        os.close(descriptor)
        raise
    _sign(descriptor, owner)
    return descriptor


class _NoLocks(Exception):
    """The file system knows no locks."""


def _wait_for(descriptor: int, run_dir: Path, until: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise RunDirError(
                    f"{run_dir} is in use by {_read_signature(descriptor)}; wait for it or end it (a notebook's kernel: "
                    "shut it down), or name another RUN_DIR."
                ) from None
            time.sleep(0.1)
        except OSError as error:
            raise _NoLocks from error


def _stand_in(run_dir: Path) -> Path:
    return Path(tempfile.gettempdir()) / f"{NAME}-{hashlib.sha256(bytes(run_dir)).hexdigest()[:16]}.lock"


def _sign(descriptor: int, owner: str) -> None:
    """Who has the lock, for the sentence of those who wait; on a full disk they are told less."""
    since = datetime.now().strftime("%H:%M")
    text = json.dumps(f"{owner} (process {os.getpid()} on {socket.gethostname()}, since {since})")
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _read_signature(descriptor: int) -> str:
    try:
        return str(json.loads(os.pread(descriptor, 1000, 0)))
    except (OSError, ValueError):
        return "another process"


def _is_handed_on(run_dir: Path) -> bool:
    """Whether the process that started this one gave us its lock on `run_dir`."""
    handed = os.environ.get(VARIABLE, "")
    if not handed.isdigit():
        return False
    try:
        ours = os.fstat(int(handed))
    except OSError:
        return False  # of a process further up, which did not hand it on
    return any(file.exists() and os.path.samestat(ours, file.stat()) for file in (run_dir / FILE, _stand_in(run_dir)))


def _follow_cells(run_dir: Path, owner: str) -> None:
    """In a notebook, until `release_lock`: a cell that failed leaves its kernel idle, and must not keep others out; each
    cell after it asks again, and says so where somebody else is at work by now."""
    shell = notebook_shell()
    if shell is None or (run_dir, owner) in _followed:
        return

    def let_go(result) -> None:
        if not result.success:
            _let_go(run_dir, owner)

    def ask_again(_) -> None:
        try:
            take_lock(run_dir, owner, wait_s=0)
        except RunDirError as error:
            print(error)

    def stop() -> None:
        shell.events.unregister("post_run_cell", let_go)
        shell.events.unregister("pre_run_cell", ask_again)

    shell.events.register("post_run_cell", let_go)
    shell.events.register("pre_run_cell", ask_again)
    _followed[run_dir, owner] = stop
