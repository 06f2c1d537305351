"""One run directory, one run at a time: a lock that ends with its process. Kernels below a driver need none."""

import fcntl
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from utils.errors import RunDirError
from utils.files import digest_of, read_lines, write_lines
from utils.project import NAME

FILE = ".lock"
_WAIT_S = 5.0  # a killed driver's kernel looks once a second whether the driver is still there
_held: dict[Path, tuple[FileLock, str]] = {}  # by whom in this process


def take_lock(run_dir: Path, owner: str, wait_s: float | None = None) -> None:
    """Lock `run_dir` unless this process or a parent has it; RunDirError after `wait_s` where another has."""
    if run_dir in _held:
        return
    lock = FileLock(_lockable(run_dir), thread_local=False)
    signed = next(iter(read_lines(_signature(lock))), {})
    for parent in psutil.Process().parents():  # another machine's process has another start; a clock can be set
        if parent.pid == signed.get("pid") and abs(parent.create_time() - signed["created"]) < 5:
            return
    try:
        lock.acquire(timeout=_WAIT_S if wait_s is None else wait_s)
    except Timeout:
        who, advice = signed.get("who", "another process"), "wait for it, shut its kernel down, or name another RUN_DIR"
        raise RunDirError(f"{run_dir} is in use by {who}; {advice}.") from None
    me = psutil.Process()
    who = f"{owner} (process {me.pid}, since {datetime.now():%H:%M})"
    with suppress(OSError):  # on a full disk those who wait are told less
        write_lines(_signature(lock), [{"who": who, "pid": me.pid, "created": me.create_time()}])
    _held[run_dir] = lock, owner


def _lockable(run_dir: Path) -> Path:
    """`.lock` there, or in the temporary folder where that file system knows no locks (Drive, some network disks)."""
    file = run_dir / FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise RunDirError(f"{run_dir} cannot be written ({error.strerror}); choose another RUN_DIR.") from None
    try:  # filelock would take a file that somebody left behind for a lock (ENOSYS), or raise (ENOTSUP)
        with file.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return file
    except OSError:
        return Path(tempfile.gettempdir()) / f"{NAME}-{digest_of(str(run_dir))}{FILE}"
    return file


def _signature(lock: FileLock) -> Path:
    return Path(f"{lock.lock_file}.json")


def release_lock(run_dir: Path, owner: str) -> None:
    """Let others in; nothing where `owner` has no lock."""
    lock, holder = _held.get(run_dir, (None, None))
    if holder == owner:
        del _held[run_dir]
        _signature(lock).unlink(missing_ok=True)
        lock.release()
