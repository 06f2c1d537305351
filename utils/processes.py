"""The one way in which the series starts a process of its own: output in a log, its end tied to ours.

    with Child([sys.executable, "-m", "utils.evaluation.workers", run_dir], log=run.file("workers/1.log")) as child:
        status = child.wait()

The command runs below a watcher (this module, run as a program) whose standard input the parent holds open. When it
closes, however the parent ended, the watcher ends the command and everything that the command started. That works for
any program, a server in C++ too, and is how nothing of a killed notebook keeps memory or a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from utils.project import ROOT, python_path

_GRACE_S = 5.0  # between "please end" and SIGKILL


class Child:
    """A command at work, with its output in `log`; leaving the `with` block ends it."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            self._watcher = subprocess.Popen(
                [sys.executable, "-m", "utils.processes", *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": python_path(), **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches us alone, and we decide what becomes of it
            )

    def __enter__(self) -> Child:
        return self

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
        """The last line of its log that is not empty, for a sentence about why it ended."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "no message"


def find_driver() -> psutil.Process | None:
    """The `python -m utils run` below which this process works, however deep; None in a notebook opened by hand."""
    with contextlib.suppress(psutil.Error):
        for parent in psutil.Process().parents():
            if parent.cmdline()[1:4] == ["-m", "utils", "run"]:
                return parent
    return None


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and all that it started; torch's launcher puts its workers into sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def _signal(family: list[psutil.Process], number: int) -> None:
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.send_signal(number)


def _watch(process: subprocess.Popen) -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a daemon thread would still hold at the interpreter's end
        _signal(_family(process), signal.SIGTERM)
    family = _family(process)
    _signal(family, signal.SIGTERM)
    _signal(psutil.wait_procs(family, timeout=_GRACE_S)[1], signal.SIGKILL)


def main(command: Sequence[str]) -> int:
    """Run `command` until it ends or our standard input closes; returns its exit status."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    watcher = threading.Thread(target=_watch, args=(process,), daemon=True)
    watcher.start()
    status = process.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
