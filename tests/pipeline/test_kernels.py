"""A notebook's kernel: it is quiet, and asked to stop when somebody asks the driver."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import time

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from utils.errors import Interrupted
from utils.pipeline.runner import check, execute, signal_kernels
from utils.pipeline.signals import StopRequest


def notebook(path, *cells: str):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


def run(tmp_path, *cells: str, stop: StopRequest | None = None) -> None:
    source = notebook(tmp_path / "in.ipynb", *cells)
    with stop or StopRequest(signal_kernels) as entered:
        execute(source, tmp_path / "out.ipynb", {}, entered)


def test_a_run_that_went_well_says_nothing_of_its_kernel(tmp_path, capfd):
    """An open port got a warning, and the interrupt before a shutdown "KeyboardInterrupt caught in kernel"."""
    run(tmp_path, "get_ipython().kernel.log.error('KeyboardInterrupt caught in kernel')\nprint(1)")
    assert capfd.readouterr() == ("", "")


def test_a_cell_whose_last_message_comes_late_has_not_failed(tmp_path):
    """Its reply is there, and what it printed is not yet: on a busy machine, or where the run was suspended in between."""
    late = (
        "import time\n"
        "kernel = get_ipython().kernel\n"
        "publish = kernel._publish_status\n"
        "def publish_late(status, *rest, **more):\n"
        "    time.sleep(6 if status == 'idle' else 0)\n"
        "    publish(status, *rest, **more)\n"
        "kernel._publish_status = publish_late"
    )
    started = time.monotonic()
    run(tmp_path, late)
    assert time.monotonic() - started > 6


def test_asked_in_the_middle_of_a_cell_the_kernel_is_interrupted_and_its_notebook_saved(tmp_path):
    cells = [f"open({str(tmp_path / 'begun')!r}, 'w').close()\nimport time\ntime.sleep(60)", "never = 1"]
    started = time.monotonic()

    def ask():
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    stop = StopRequest(signal_kernels)
    with pytest.raises(PapermillExecutionError) as error:
        run(tmp_path, *cells, stop=stop)
    assert error.value.ename == "KeyboardInterrupt" and time.monotonic() - started < 30
    with pytest.raises(Interrupted, match="stopped by SIGTERM; what was saved stays"):
        check(stop)
    assert (tmp_path / "out.ipynb").exists()


def test_asked_before_it_began_a_notebook_runs_no_cell(tmp_path):
    with StopRequest() as stop, pytest.raises(Interrupted, match="stopped by Ctrl-C"):
        os.kill(os.getpid(), signal.SIGINT)
        execute(
            notebook(tmp_path / "in.ipynb", f"open({str(tmp_path / 'begun')!r}, 'w')"), tmp_path / "out.ipynb", {}, stop
        )
    assert not (tmp_path / "begun").exists()


def test_asked_where_the_kernel_does_not_listen_the_next_cell_does_not_begin(tmp_path):
    """Between two cells a kernel ignores the signal."""
    deaf = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(2)"
    )
    second = f"open({str(tmp_path / 'second')!r}, 'w').close()"
    with pytest.raises(Interrupted):
        run(tmp_path, deaf, second)
    assert not (tmp_path / "second").exists()


def test_a_kernel_that_was_not_ready_yet_is_not_left_behind(tmp_path, monkeypatch):
    started = []

    def interrupted_while_it_starts(*_, **__):
        manager = AsyncKernelManager(kernel_name="python3")
        asyncio.run(manager.start_kernel())
        started.extend((manager, manager.provisioner.process))
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.pipeline.runner.papermill.execute_notebook", interrupted_while_it_starts)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "1")
    manager, process = started
    assert process.wait(10) == -signal.SIGKILL
    asyncio.run(manager.cleanup_resources())  # its context would wait for its socket, whenever garbage is collected


def test_cut_short_by_a_second_ctrl_c_nothing_is_told_of_the_task_that_was_left(tmp_path, monkeypatch, caplog):
    """nbclient's ended in DeadKernelError while the kernel was killed, once in many runs."""
    left = []
    gc.freeze()  # other tests' garbage, which may wait for a kernel, is not this one's to collect

    def cut_short(*_, **__):
        loop = asyncio.new_event_loop()
        left.append(loop.create_task(fails()))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        raise KeyboardInterrupt

    async def fails():
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", False)
    monkeypatch.setattr("utils.pipeline.runner.papermill.execute_notebook", cut_short)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "1")
    left.clear()
    gc.collect()
    gc.unfreeze()
    assert not caplog.records
