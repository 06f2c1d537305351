"""A notebook's kernel: it is left alone when it is done, and asked to stop when somebody asks the driver."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from utils.errors import Interrupted
from utils.pipeline.jupyter import check, execute, signal_kernels
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


def test_a_kernel_that_is_done_gets_no_interrupt(tmp_path):
    """jupyter_client sends one before it asks a kernel to shut down; "KeyboardInterrupt caught in kernel" was the trace."""
    listening = f"""
import pathlib, signal
kernel = get_ipython().kernel
kernel.pre_handler_hook = kernel.post_handler_hook = lambda: None  # as in the moment of the last reply
signal.signal(signal.SIGINT, lambda *_: pathlib.Path({str(tmp_path / "interrupted")!r}).touch())
"""
    run(tmp_path, listening)
    assert not (tmp_path / "interrupted").exists()


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

    def interrupted_while_it_starts(*_, kernel_manager_class, **__):
        manager = kernel_manager_class(kernel_name="python3")
        asyncio.run(manager.start_kernel())
        started.append(manager.provisioner.process)
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.pipeline.jupyter.papermill.execute_notebook", interrupted_while_it_starts)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "1")
    assert started[0].wait(10) == -signal.SIGKILL


def test_a_temporary_folder_with_a_long_path_is_no_obstacle(tmp_path, monkeypatch):
    """A socket file below it had a name longer than the 107 characters that zmq takes."""
    scratch = tmp_path / ("a-long-name-" * 10)
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    run(tmp_path, "print(1)")
    assert (tmp_path / "out.ipynb").exists()
