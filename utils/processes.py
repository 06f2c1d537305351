"""The one way in which the series starts a process of its own: output in a log, its end tied to ours.

It runs below a watcher (this module as a program), whose standard input the parent holds open. When that closes, however
the parent ended, the watcher ends the command and all that it started: nothing of a killed notebook keeps a GPU. Where
the command ends first, killed or not, the watcher ends what it left behind.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from utils.errors import last_line
from utils.project import ROOT, python_path

_GRACE_S = 5.0  # between "please end" and SIGKILL
_LOOK_S = 0.5  # between two looks at what the command has started


class Child(contextlib.AbstractContextManager):
    """A command at work, with its output in `log`; leaving the `with` block ends it."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            self._watcher = subprocess.Popen(
                [sys.executable, "-m", "utils.processes", *map(str, command)], cwd=ROOT,
                env={**os.environ, "PYTHONPATH": python_path(), **(environment or {})},
                stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we decide what becomes of it
            )  # fmt: skip

    def __exit__(self, *_) -> None:
        self.end()

    def poll(self) -> int | None:
        """The exit status (128 + n after signal n); None while it is at work."""
        return self._watcher.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit status once it has ended; raises subprocess.TimeoutExpired."""
        return self._watcher.wait(timeout_s)

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the command and all that it started: they may come to a good end."""
        with contextlib.suppress(OSError):
            self._watcher.stdin.write(b"s")
            self._watcher.stdin.flush()

    def end(self) -> None:
        """End it and wait until it is gone: SIGTERM, and SIGKILL for what is still there seconds later."""
        with contextlib.suppress(OSError):
            self._watcher.stdin.close()
        self._watcher.wait()

    def last_words(self) -> str:
        """The last line of its log that is not empty, for a sentence about why it ended; no secret, nor half of one."""
        from utils.secrets import redact  # which imports this module

        return redact(last_line(self.log.read_text(encoding="utf-8", errors="replace")))[:300]


def find_driver() -> psutil.Process | None:
    """The `python -m utils run` below which this process works, however deep; None in a notebook opened by hand."""
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            if parent.cmdline()[1:4] == ["-m", "utils", "run"]:
                return parent
    return None


def is_executed() -> bool:
    """Whether a program runs this notebook, `python -m utils run` or papermill, and nobody looks at its cells."""
    return find_driver() is not None or any(".ipynb" in word for word in psutil.Process().parent().cmdline())


class _Family:
    """A command and all that it started, sessions of their own too: who was seen once stays known as an orphan."""

    def __init__(self, pid: int):
        self._members = [psutil.Process(pid)]
        self._lock = threading.Lock()

    def look(self) -> list[psutil.Process]:
        """Who is there now. A zombie is not: nobody may ever ask for an orphan's status."""
        with self._lock:
            found: list[psutil.Process] = []
            for member in self._members:  # the oldest first, which finds most of the others
                with contextlib.suppress(psutil.Error):
                    if member not in found and member.status() != psutil.STATUS_ZOMBIE:
                        found += [member, *member.children(recursive=True)]
            self._members = list(dict.fromkeys(found))
            return self._members

    def send(self, number: int) -> None:
        for member in self.look():
            with contextlib.suppress(psutil.Error):
                member.send_signal(number)

    def end(self) -> None:
        """SIGTERM, and SIGKILL for what is still there after the grace."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.send(number)
            until = time.monotonic() + _GRACE_S
            while self.look() and time.monotonic() < until:
                time.sleep(0.05)


def _watch(family: _Family) -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a daemon thread would still hold at the interpreter's end
        family.send(signal.SIGTERM)
    family.end()


def main(command: Sequence[str]) -> int:
    """Run `command` until it ends or our standard input closes, and end what it leaves; returns its exit status."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    family = _Family(process.pid)
    threading.Thread(target=_watch, args=(family,), daemon=True).start()
    while True:
        family.look()
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(_LOOK_S)
            break
    family.end()  # here, since the thread may wait for the parent for ever
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
