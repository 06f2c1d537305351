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
from utils.pipeline.jupyter import Kernels


def notebook(path, *cells: str):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, path)
    return path


def test_a_kernel_that_is_done_gets_no_interrupt(tmp_path):
    """jupyter_client sends one before it asks a kernel to shut down; "KeyboardInterrupt caught in kernel" was the trace."""
    listening = f"""
import pathlib, signal
kernel = get_ipython().kernel
kernel.pre_handler_hook = kernel.post_handler_hook = lambda: None  # as in the moment of the last reply
signal.signal(signal.SIGINT, lambda *_: pathlib.Path({str(tmp_path / "interrupted")!r}).touch())
"""
    with Kernels() as kernels:
        kernels.execute(notebook(tmp_path / "in.ipynb", listening), tmp_path / "out.ipynb", {})
    assert not (tmp_path / "interrupted").exists()


def test_asked_in_the_middle_of_a_cell_the_kernel_is_interrupted_and_its_notebook_saved(tmp_path):
    cells = [f"open({str(tmp_path / 'begun')!r}, 'w').close()\nimport time\ntime.sleep(60)", "never = 1"]
    started = time.monotonic()

    def ask():
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with Kernels() as kernels:
        with pytest.raises(PapermillExecutionError) as error:
            kernels.execute(notebook(tmp_path / "in.ipynb", *cells), tmp_path / "out.ipynb", {})
        assert error.value.ename == "KeyboardInterrupt" and time.monotonic() - started < 30
        with pytest.raises(Interrupted, match="stopped by SIGTERM; what was saved stays"):
            kernels.check()
    assert (tmp_path / "out.ipynb").exists()


def test_asked_between_two_notebooks_the_next_one_does_not_begin(tmp_path):
    with Kernels() as kernels, pytest.raises(Interrupted, match="stopped by Ctrl-C"):
        os.kill(os.getpid(), signal.SIGINT)
        kernels.execute(tmp_path / "none.ipynb", tmp_path / "out.ipynb", {})


def test_asked_where_the_kernel_does_not_listen_the_next_cell_does_not_begin(tmp_path):
    """Between two cells a kernel ignores the signal."""
    deaf = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(2)"
    )
    second = f"open({str(tmp_path / 'second')!r}, 'w').close()"
    with Kernels() as kernels, pytest.raises(Interrupted):
        kernels.execute(notebook(tmp_path / "in.ipynb", deaf, second), tmp_path / "out.ipynb", {})
    assert not (tmp_path / "second").exists()


def test_a_kernel_that_was_not_ready_yet_is_not_left_behind(tmp_path, monkeypatch):
    started = []

    def interrupted_while_it_starts(*_, kernel_manager_class, **__):
        manager = kernel_manager_class(kernel_name="python3")
        asyncio.run(manager.start_kernel())
        started.append(manager.provisioner.process)
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.pipeline.jupyter.papermill.execute_notebook", interrupted_while_it_starts)
    with Kernels() as kernels, pytest.raises(KeyboardInterrupt):
        kernels.execute(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {})
    assert started[0].poll() is not None
