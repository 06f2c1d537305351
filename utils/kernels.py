"""One notebook in a fresh kernel by papermill: nobody else can talk to it, and it can be asked to stop."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import papermill
import traitlets
from jupyter_client import AsyncKernelManager

from utils.errors import Interrupted
from utils.interruption import StopRequest
from utils.lock import hand_on

_AGAIN_S = 1.0  # a kernel that was between two cells has ignored the signal


class IpcKernelManager(AsyncKernelManager):
    """Talks to the kernel through a socket file of this user rather than an open TCP port."""

    transport = traitlets.CaselessStrEnum(["tcp", "ipc"], default_value="ipc", config=True)

    @traitlets.default("ip")
    def _own_socket(self) -> str:
        """A path of its own: the default is one name for all kernels started in a directory."""
        return str(Path(tempfile.gettempdir()) / f"kernel-{uuid.uuid4().hex}")

    async def _async_interrupt_kernel(self) -> None:
        """jupyter_client interrupts a kernel before it asks it to shut down, at a notebook's end too: there it hits the
        last reply now and then, which the kernel tells as "KeyboardInterrupt caught in kernel"."""
        if not self.shutting_down:
            await super()._async_interrupt_kernel()

    interrupt_kernel = _async_interrupt_kernel  # what jupyter_client 7, which the images have, asks for


class Kernels:
    """Executes notebooks one after the other; Ctrl-C and SIGTERM go to the kernel at work, and to nobody else.

    with Kernels(lock) as kernels:
        kernels.execute(notebook, output, parameters)

    Where no kernel is at work they raise Interrupted at once. A second one, some seconds later, ends the kernel without
    waiting for what it is doing.
    """

    def __init__(self, lock: int | None = None):
        self.stop = StopRequest(self._forward)
        self._executing = False  # a cell, as far as this process knows
        self._manager: IpcKernelManager | None = None
        self._lock = lock

    def __enter__(self) -> Kernels:
        self.stop.__enter__()
        return self

    def __exit__(self, *details) -> None:
        self.stop.__exit__(*details)

    def execute(self, notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
        """Run `notebook` and save it with its outputs; raises what papermill does, and Interrupted."""
        self.check()
        kernels = self

        class Manager(IpcKernelManager):
            async def start_kernel(self, **options: Any) -> None:
                kernels._manager = self
                await super().start_kernel(**options, **hand_on(kernels._lock))

        try:
            papermill.execute_notebook(
                str(notebook),
                str(output),
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                kernel_manager_class=Manager,
                on_cell_execute=self._begin_cell,
                on_cell_executed=self._end_cell,
            )
        finally:
            self._end_kernel()
            self._manager, self._executing = None, False
        self.check()

    def check(self) -> None:
        """Raise Interrupted where somebody asked to stop."""
        if self.stop.asked:
            raise Interrupted(f"stopped by {self.stop.name}; what was saved stays")

    def _begin_cell(self, **_: Any) -> None:
        self.check()
        self._executing = True

    def _end_cell(self, **_: Any) -> None:
        self._executing = False

    def _end_kernel(self) -> None:
        """nbclient leaves a kernel behind that is interrupted before it was ready."""
        provisioner = self._manager.provisioner if self._manager else None
        if provisioner is not None and provisioner.process is not None and provisioner.process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(provisioner.pgid, signal.SIGKILL)
            provisioner.process.wait()

    def _forward(self) -> None:
        if self._manager is None:
            self.check()
        self._interrupt()
        again = threading.Timer(_AGAIN_S, self._interrupt)
        again.daemon = True
        again.start()

    def _interrupt(self) -> None:
        """SIGINT for the kernel's process group, as Jupyter's stop button sends it, while a cell is executed."""
        manager = self._manager
        if self._executing and manager is not None and manager.provisioner is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(manager.provisioner.pgid, signal.SIGINT)
