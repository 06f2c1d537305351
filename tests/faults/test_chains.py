"""Disturbed in every stage and started again, the series ends with the bits of an undisturbed run.

A chain is one run directory in which one run after the other is killed, asked to stop, or left without disk space.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.series_process import SeriesProcess, left_over, results, stage_seconds
from utils.pipeline.run_dir import altered_files

START = 1.5  # seconds that a stage takes beside what the manifest counts: its kernel's start
TEXTS = {".json", ".jsonl", ".yaml", ".csv", ".md", ".py", ".txt"}  # what is read again; executed notebooks are history
CHECKPOINT = "training/checkpoints/*/checkpoint-*/trainer_state.json"
# What has to be on the disk before a wish to stop or a full disk comes: something to resume from, or to lose.
ON_DISK = {"00": "state.json", "01": "baseline/answers.jsonl", "03": CHECKPOINT, "04": "tuned/answers.jsonl", "05": "export/adapter"}  # fmt: skip


def kill(series: SeriesProcess) -> str:
    series.kill()
    return ""


def ask(number: signal.Signals, series: SeriesProcess) -> str:
    """Ctrl-C reaches the foreground process group, SIGTERM the process that was started; what is wrong with the end."""
    everybody = series.everybody()
    (os.killpg if number == signal.SIGINT else os.kill)(series.process.pid, number)
    status = series.wait(180)
    state = json.loads((series.path / "state.json").read_text())
    steps = re.search(r"Training stopped at step (\d+) of 16 with a checkpoint", series.output)
    found = {
        "status": status == 128 + number,
        "line": f"--run-dir {series.path} --from {state['stage'][:2]}" in series.lines[-1],
        "state": (state["state"], state["kind"]) == ("continue", "Interrupted"),
        "no stack": "Traceback" not in series.output and "KeyboardInterrupt" not in series.output,
        "nobody left": not left_over(everybody),
        "checkpoint": series.stage != "03" or (steps and [*series.path.glob(CHECKPOINT.replace("-*/t", f"-{steps[1]}/t"))]),
    }  # fmt: skip
    wrong = [name for name, well in found.items() if not well]
    return f"{', '.join(wrong)}; {status}:\n{series.output}" if wrong else ""


def fill_disk(series: SeriesProcess) -> str:
    """From now on no process of the series can write a file beyond ten bytes; what is wrong with how it ends."""
    for process in series.everybody():
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10, 10))
    status = series.wait(300)
    wrong = ["Traceback"] if "Traceback" in series.output else []
    wrong += [] if status == 1 else [f"status {status}"]
    return f"{', '.join(wrong)}\n{series.output}" if wrong else ""


DISTURB = {
    "kill -9": kill,
    "SIGTERM": partial(ask, signal.SIGTERM),
    "Ctrl-C": partial(ask, signal.SIGINT),
    "disk full": fill_disk,
}
MIXED = ("00 kill -9", "01 SIGTERM", "02 kill -9", "03 Ctrl-C", "03 disk full", "04 kill -9", "05 disk full")
KILLS = ("00 kill -9", "01 kill -9", "02 kill -9", "03 kill -9", "04 kill -9", "05 kill -9")
SIGNALS = ("00 SIGTERM", "01 Ctrl-C", "02 SIGTERM", "03 SIGTERM", "04 Ctrl-C", "05 Ctrl-C")
FULL = ("00 disk full", "01 disk full", "02 disk full", "04 disk full", "06 disk full")
# (what happens, what becomes of the directory after each); CI does the first
CHAINS = [(MIXED, "moved"), (KILLS, "copied"), (SIGNALS, "stays"), (FULL, "stays")]


@pytest.mark.parametrize(("disturbances", "way"), CHAINS, ids=["mixed", "kills", "signals", "full"])
def test_disturbed_and_run_again_it_ends_with_the_same_bits(disturbances, way, small_run, tmp_path, fault, long):
    if disturbances is not MIXED and not long:
        pytest.skip("in make faults")
    path, left_behind, random_moment = tmp_path / "run-0", {}, random.Random(way)
    usual, wrong = stage_seconds(small_run), []
    for count, (stage, kind) in enumerate((one.split(" ", 1) for one in disturbances), start=1):
        series = SeriesProcess(path, PYTHONHASHSEED="11")  # not that of the undisturbed run
        seconds = random_moment.uniform(0, usual[stage] + START) if kind == "kill -9" else 0
        there = series.wait_until(stage, seconds, "" if kind == "kill -9" else ON_DISK.get(stage, ""))
        assert there, f"it ended before it could be disturbed in {stage}:\n{series.output}"
        fault(f"{kind} in {series.place}", lost_seconds=time.monotonic() - series.began)
        if said := DISTURB[kind](series):
            wrong.append(f"{kind} in {stage}: {said}")
        assert not path.exists() or altered_files(path) == []
        if way != "stays" and path.exists():  # it may have been killed before it made it
            old, path = path, tmp_path / f"run-{count}"
            subprocess.run(["mv", old, path] if way == "moved" else ["cp", "-r", old, path], check=True)
            left_behind[old] = times(old)
            fault(f"run directory {way} in between")
    last = SeriesProcess(path)
    assert last.wait() == 0, last.output
    assert not wrong, "\n\n".join(wrong)
    assert results(path) == results(small_run)
    assert not [file for file in path.rglob(".*") if file.name != ".lock"]  # what killed writers had begun
    assert not [old for old, before in left_behind.items() if times(old) != before]
    assert not [file for file in path.rglob("*") if left_behind and points_to(file, left_behind)]


def times(folder: Path) -> dict[Path, int]:
    """When each file was written; nothing where there is no folder any more."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def points_to(file: Path, places: Iterable[Path]) -> bool:
    """Whether a file that is read again names one of `places`."""
    if file.suffix not in TEXTS or "report" in file.parts:
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return any(f"{place}/" in text or f'{place}"' in text for place in places)
