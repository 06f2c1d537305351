"""Processes that die alone, come twice, or hang: nobody is left at work, and two never write one directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.series_process import ONE_THREAD, SETTINGS, SeriesProcess, left_over, wait_for
from utils.project import ROOT, python_path

OPEN = "from utils.pipeline.stage import open_stage; open_stage('00_setup', 'demo', {path!r}); print('open', flush=True); input()"


def kernel_is_at_work(series: SeriesProcess) -> bool:
    """Whether 00 has opened: until then its kernel may be a process that is only just being made."""
    manifest = series.path / "manifest.json"
    return manifest.exists() and '"running"' in manifest.read_text(encoding="utf-8")


def test_a_second_ctrl_c_ends_it_at_once_where_the_kernel_hangs(tmp_path, fault):
    fault("Ctrl-C twice, the kernel hangs")
    series = SeriesProcess(tmp_path / "run", "--to", "00")
    assert wait_for(lambda: kernel_is_at_work(series))
    everybody = series.everybody()
    for one in everybody[1:]:
        one.send_signal(signal.SIGSTOP)  # it does nothing for a wish
    for _ in range(2):
        os.killpg(series.process.pid, signal.SIGINT)
        time.sleep(3.5)
    assert series.wait(60) == 128 + signal.SIGINT and "Traceback" not in series.output, series.output
    assert f"--run-dir {series.path} --from 00" in series.lines[-1] and not left_over(everybody)


@pytest.mark.parametrize("who", ["driver", "kernel"])
def test_one_killed_alone_is_survived_by_nobody_and_the_same_command_works(who, tmp_path, fault):
    fault(f"kill -9 of the {who} alone")
    series = SeriesProcess(tmp_path / "run", "--to", "00")
    assert wait_for(lambda: kernel_is_at_work(series))
    driver, *kernel = series.everybody()
    (driver if who == "driver" else kernel[0]).kill()
    status = series.process.wait(120)
    again = SeriesProcess(tmp_path / "run", "--to", "00")
    assert again.wait() == 0, again.output
    assert not left_over(kernel)
    if who == "kernel":
        assert status == 1 and "its kernel died" in series.output and "To resume" in series.lines[-1], series.output


def test_a_second_run_or_notebook_on_a_directory_is_refused_until_the_first_has_ended(tmp_path, fault):
    fault("a second run, or a notebook, on one directory", tried=3)
    path = tmp_path / "run"
    first = SeriesProcess(path, "--to", "00")
    assert wait_for(lambda: kernel_is_at_work(first))
    first.process.send_signal(signal.SIGSTOP)  # both come while it is at work, on a busy machine too
    second = SeriesProcess(path)
    second.wait()
    by_hand = subprocess.run([sys.executable, "-c", OPEN.format(path=str(path))], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    first.process.send_signal(signal.SIGCONT)
    in_use = f"{path} is in use by python -m utils run (process {first.process.pid}, since"
    assert second.process.returncode == 1 and in_use in second.output and len(second.lines) == 1, second.output
    assert by_hand.returncode != 0 and "is in use by python -m utils run" in by_hand.stderr
    assert first.wait() == 0, first.output

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    notebook = subprocess.Popen([sys.executable, "-c", OPEN.format(path=str(path))], cwd=ROOT, **pipes)
    assert notebook.stdout.readline() == "open\n"
    refused = SeriesProcess(path, "--to", "00")
    assert refused.wait() == 1 and f"is in use by 00_setup (process {notebook.pid}, since" in refused.output
    notebook.kill()
    notebook.wait()
    then = SeriesProcess(path, "--to", "00")
    assert then.wait() == 0, then.output
    assert json.loads((path / "state.json").read_text())["state"] == "done"


def test_a_finished_run_that_was_copied_is_finished_there(small_run, tmp_path, fault):
    fault("finished directory copied")
    shutil.copytree(small_run, tmp_path / "elsewhere", copy_function=shutil.copy)  # with new times
    again = SeriesProcess(tmp_path / "elsewhere")
    assert again.wait() == 0 and again.output.count("unchanged") == 6, again.output


def can_mount() -> bool:
    """Whether a file system of our own can be mounted here, seen by nobody else."""
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt && mount --bind -o ro /mnt /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
@pytest.mark.parametrize("holding", ["nothing", "a finished run"])
def test_a_read_only_directory_is_told_before_anything_runs(small_run, tmp_path, holding, fault):
    fault(f"read-only directory that holds {holding}")
    path = tmp_path / "run"
    shutil.copytree(small_run, path) if holding != "nothing" else path.mkdir()
    script = 'place=$1; shift; mount --bind "$place" "$place" && mount -o remount,bind,ro "$place" && exec "$@"'
    change = ["--set", "data.eval_rows=8"] if holding != "nothing" else []
    run = [sys.executable, "-m", "utils", "run", "--profile", "demo", "--run-dir", path, *SETTINGS, *change]
    command = ["unshare", "-rm", "sh", "-c", script, "sh", path, *run]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": python_path()}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "cannot be written" in said and len(said.strip().splitlines()) <= 3, said
    assert "Traceback" not in said and "Errno" not in said
