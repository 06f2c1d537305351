"""One run directory, one run at a time: a lock that ends with the process that holds it, however that ends.

It lies on `.lock` in the run directory or, where that file system knows no locks (Drive, some network disks), on a file in
the machine's temporary folder, which only this machine sees. The driver locks; kernels below it need no lock of their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from utils.errors import RunDirError
from utils.files import parse_json, write_json
from utils.progress import notebook_shell
from utils.project import NAME

FILE = ".lock"
_WAIT_S = 5.0  # a killed driver's kernel looks once a second whether the driver is still there
_held: dict[Path, tuple[FileLock | None, str]] = {}  # by whom in this process; None where nothing can be locked
_notebook: dict[Path, str] = {}  # the stages that are at work in this notebook


def take_lock(run_dir: Path, owner: str, wait_s: float | None = None) -> None:
    """Lock `run_dir` for `owner`, a stage or a command, until `release_lock` or the end of this process.

    Nothing where this process has it, or one that started it. Raises RunDirError after `wait_s` where another has it.
    """
    if run_dir in _held:
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / FILE).touch()
    except OSError as error:
        raise RunDirError(f"{run_dir} cannot be written ({error.strerror}); choose another RUN_DIR.") from None
    elsewhere = f"{NAME}-{hashlib.sha256(bytes(run_dir)).hexdigest()[:16]}{FILE}"
    file = next(filter(_knows_locks, (run_dir / FILE, Path(tempfile.gettempdir()) / elsewhere)), None)
    if file is None:
        _held[run_dir] = None, owner
        return
    signed = _read_signature(file)
    if _is_held_above(signed):
        return
    lock = FileLock(file, thread_local=False)
    try:
        lock.acquire(timeout=_WAIT_S if wait_s is None else wait_s)
    except Timeout:
        raise RunDirError(
            f"{run_dir} is in use by {signed.get('who', 'another process')}; wait for it or end it (a notebook's kernel: "
            "shut it down), or name another RUN_DIR."
        ) from None
    me = psutil.Process()
    who = f"{owner} (process {me.pid}, since {datetime.now():%H:%M})"
    with suppress(OSError):  # on a full disk those who wait are told less
        write_json(_signature(file), {"who": who, "pid": me.pid, "created": me.create_time()})
    _held[run_dir] = lock, owner


def release_lock(run_dir: Path, owner: str) -> None:
    """Let others in; nothing where `owner` has no lock."""
    _notebook.pop(run_dir, None)
    _let_in(run_dir, owner)


def follow_cells(run_dir: Path, owner: str) -> None:
    """In a notebook, until `release_lock`: a cell that failed leaves an idle kernel, which must not keep others out."""
    if shell := notebook_shell():
        _notebook[run_dir] = owner
        shell.events.register("post_run_cell", _after_cell)  # once, however often
        shell.events.register("pre_run_cell", _before_cell)


def _after_cell(result: Any) -> None:
    for run_dir, owner in _notebook.items() if not result.success else ():
        _let_in(run_dir, owner)


def _before_cell(_: Any) -> None:
    for run_dir, owner in _notebook.items():
        try:
            take_lock(run_dir, owner, wait_s=0)
        except RunDirError as error:
            print(error)


def _let_in(run_dir: Path, owner: str) -> None:
    lock, holder = _held.get(run_dir, (None, None))
    if holder == owner:
        del _held[run_dir]
        if lock:
            _signature(Path(lock.lock_file)).unlink(missing_ok=True)
            lock.release()


def _knows_locks(file: Path) -> bool:
    """Asked here: filelock would take a file that somebody left behind for a lock (ENOSYS), or raise (ENOTSUP)."""
    try:
        with file.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


def _signature(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _read_signature(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = parse_json(_signature(file).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _is_held_above(signed: dict[str, Any]) -> bool:
    """Whether who signed started this process, directly or not; another machine's process has another start."""
    with suppress(psutil.Error):
        above = {parent.pid: parent.create_time() for parent in psutil.Process().parents()}
        return abs(above.get(signed.get("pid"), -9.0) - signed.get("created", 0.0)) < 5  # a clock can be set
    return False
