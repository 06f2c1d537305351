"""One notebook in a fresh kernel by papermill, which can be asked to stop."""

from __future__ import annotations

import os
import signal
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import papermill
import psutil
import traitlets
from jupyter_client import AsyncKernelManager

from utils.errors import Interrupted
from utils.pipeline.signals import StopRequest


class _KernelManager(AsyncKernelManager):
    """Socket files of this user instead of an open port, about which ipykernel warns once a stage (it is not encrypted)."""

    transport = traitlets.CaselessStrEnum(["tcp", "ipc"], default_value="ipc", config=True)

    @traitlets.default("ip")
    def _socket(self) -> str:
        return f"/tmp/kernel-{uuid.uuid4().hex}"  # noqa: S108 - not TMPDIR: zmq takes 107 characters, 103 on macOS

    async def _async_interrupt_kernel(self) -> None:
        """Not at a notebook's end: jupyter_client interrupts a kernel before it asks it to shut down, and where that hits
        the last reply, "KeyboardInterrupt caught in kernel" is printed below a run that went well."""
        if not self.shutting_down:
            await super()._async_interrupt_kernel()

    interrupt_kernel = _async_interrupt_kernel  # what jupyter_client 7, which the images have, asks for


def execute(notebook: Path, output: Path, parameters: dict[str, Any], stop: StopRequest) -> None:
    """Run `notebook` and save it with its outputs; raises what papermill does, and Interrupted before the next cell."""
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            kernel_manager_class=_KernelManager,
            on_cell_execute=lambda **_: check(stop),
        )
    finally:
        signal_kernels(
            signal.SIGKILL
        )  # nbclient leaves one behind that hangs, or that was interrupted before it was ready


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
