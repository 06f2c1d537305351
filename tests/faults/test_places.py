"""Where a run directory lies: full, read-only, moved, copied, or in use by somebody else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.series_process import ONE_THREAD, RESULTS, SMALL, SeriesProcess
from utils.project import ROOT, python_path

STAGES = ("00", "01", "02", "03", "04", "05")
SPLIT = ("data/train.parquet", "data/eval.parquet", "baseline/answers.jsonl", "data/formatted/train.parquet")


def can_mount() -> bool:
    """Whether a file system of our own can be mounted here, seen by nobody else."""
    if not shutil.which("unshare"):
        return False
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt && mount --bind -o ro /mnt /mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


mounts = pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")


def series_words(path: Path, *words: str) -> list[str]:
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "utils", "run", "--profile", "demo", "--run-dir", str(path), *settings, *words]


def in_own_mounts(script: str, *words: str | Path, timeout: float = 900) -> subprocess.CompletedProcess:
    """A shell script that may mount."""
    command = ["unshare", "-rm", "sh", "-c", script, "sh", *map(str, words)]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": python_path()}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )


def sentence_in(output: str) -> str:
    """What is wrong with how a run told that its disk refuses; empty where nothing is."""
    wrong = [word for word in ("Traceback", "Errno") if word in output]
    if not any(
        told in output for told in ("The disk is full", "The disk filled up", "cannot be written", "GiB of free disk")
    ):
        wrong.append("no sentence")
    return f"{', '.join(wrong)}\n{output}" if wrong else ""


@mounts
def test_on_a_disk_that_somebody_else_fills_it_ends_in_a_sentence_and_goes_on_when_there_is_space(
    small_run, tmp_path, record_fault, long
):
    place, out = tmp_path / "disk", tmp_path / "out"
    place.mkdir()
    last, stages = ("05", STAGES) if long else ("02", STAGES[:3])
    words = [sys.executable, "-m", "tests.faults.full_disk", place, out, last, *stages]
    done = in_own_mounts('exec "$@"', *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wrong = [told for failure in found["failures"] if failure["status"] and (told := sentence_in(failure["output"]))]
    assert all(failure["at_work"] for failure in found["failures"]), found
    kept = (*RESULTS, *SPLIT) if long else SPLIT
    same = found["status"] == 0 and all((out / "run" / n).read_bytes() == (small_run / n).read_bytes() for n in kept)
    record_fault("disk filled by somebody else", tried=len(stages), survived=(len(stages) - len(wrong)) * same)
    assert not wrong, wrong[0]
    assert same, found["output"]
    assert any(failure["status"] for failure in found["failures"]), found


@mounts
@pytest.mark.parametrize("holding", ["nothing", "a finished run"])
def test_a_read_only_directory_is_told_before_anything_runs(small_run, tmp_path, holding, record_fault):
    path = tmp_path / "run"
    shutil.copytree(small_run, path) if holding != "nothing" else path.mkdir()
    script = 'place=$1; shift; mount --bind "$place" "$place" && mount -o remount,bind,ro "$place" && exec "$@"'
    changed = ["--set", "data.eval_rows=8"] if holding != "nothing" else []
    done = in_own_mounts(script, path, *series_words(path, *changed))
    said = done.stdout + done.stderr
    wrong = sentence_in(said) or ("" if done.returncode == 1 and len(said.strip().splitlines()) <= 3 else said)
    record_fault(f"read-only directory that holds {holding}", survived=int(not wrong))
    assert not wrong


def test_a_finished_run_that_was_moved_is_finished_there(small_run, tmp_path, record_fault):
    new = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", small_run, new], check=True)
    again = SeriesProcess(new)
    whole = again.wait() == 0 and again.output.count("unchanged") == 6
    record_fault("finished directory copied", survived=int(whole))
    assert whole, again.output


def test_the_second_run_on_a_directory_is_told_and_the_first_goes_on(tmp_path, record_fault):
    path = tmp_path / "run"
    first = SeriesProcess(path, "--to", "03")  # long enough for both to come, on a busy machine too
    assert first.wait_until("01")
    second = SeriesProcess(path)
    status = second.wait()
    by_hand = subprocess.run(
        [sys.executable, "-c", f"from utils.pipeline.stage import open_stage; open_stage('00_setup', 'demo', {str(path)!r})"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = status == 1 and f"{path} is in use by python -m utils run (process {first.process.pid} on" in second.output
    told_by_hand = by_hand.returncode != 0 and "is in use by python -m utils run" in by_hand.stderr
    ended = first.wait()
    record_fault("a second run on one directory", tried=2, survived=(told + told_by_hand) * (ended == 0))
    assert told and len(second.lines) == 1, second.output
    assert told_by_hand, by_hand.stderr
    assert ended == 0, first.output


def test_a_notebook_at_work_keeps_a_run_out_until_its_kernel_is_gone(tmp_path, record_fault):
    path = tmp_path / "run"
    code = f"from utils.pipeline.stage import open_stage; open_stage('00_setup', 'demo', {str(path)!r}); print('open', flush=True); input()"  # fmt: skip
    kernel = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert kernel.stdout.readline() == "open\n"
    refused = SeriesProcess(path, "--to", "00")
    told = refused.wait() == 1 and f"is in use by 00_setup (process {kernel.pid} on" in refused.output
    kernel.kill()
    kernel.wait()
    then = SeriesProcess(path, "--to", "00")
    free = then.wait() == 0
    record_fault("a run beside a notebook at work, then after its death", tried=2, survived=told + free)
    assert told, refused.output
    assert free, then.output
    assert json.loads((path / "state.json").read_text())["state"] == "done"
