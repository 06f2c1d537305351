"""One notebook in a fresh kernel by papermill, which can be asked to stop."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import papermill
import psutil

from utils.errors import Interrupted
from utils.pipeline.signals import StopRequest

# ipykernel warns once a stage that its port is not encrypted, and tells of the interrupt that comes before each shutdown.
_QUIET = ["--log-level=CRITICAL"]


def execute(notebook: Path, output: Path, parameters: dict[str, Any], stop: StopRequest) -> None:
    """Run `notebook` and save it with its outputs; raises what papermill does, and Interrupted before the next cell."""
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=_QUIET,
            on_cell_execute=lambda **_: check(stop),
        )
    finally:  # nbclient leaves a kernel behind that hangs, or that was interrupted before it was ready
        signal_kernels(signal.SIGKILL)


def check(stop: StopRequest) -> None:
    """Raise Interrupted where somebody asked to stop."""
    if stop.asked:
        raise Interrupted(f"stopped by {stop.name}; what was saved stays")


def signal_kernels(number: int = signal.SIGINT) -> None:
    """A signal for the process group of every kernel that this process started; SIGINT is what Jupyter's stop button sends."""
    for child in psutil.Process().children():
        with suppress(psutil.Error, OSError):
            if os.getpgid(child.pid) == child.pid:
                os.killpg(child.pid, number)
