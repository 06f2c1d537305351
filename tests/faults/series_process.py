"""A small demo as a process of its own that can be killed, and how much of its work a kill costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from utils.project import ROOT, python_path

SMALL = {
    "data.train_rows": 48,
    "data.eval_rows": 16,
    "evaluate.resamples": 1000,
    "train.per_device_train_batch_size": 4,
    "train.max_steps": 16,
    "train.save_steps": 2,
    "generate.max_new_tokens": 64,
    "export.prompts": 2,
    "tracking.mode": "disabled",
    "hardware.min_disk_gib": 0.01,
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}  # two chains share two cores
KEPT = ("*/answers.jsonl", "*/answers.[0-9]*.jsonl", "training/checkpoints/*/checkpoint-*/trainer_state.json")
RESULTS = ("comparison/metrics.json", "training/adapter/adapter_model.safetensors", "export/merged/model.safetensors")


class SeriesProcess:
    """`python -m utils run` on `path` in a process group of its own, followed from outside."""

    def __init__(self, path: Path, *words: str, settings: dict | None = None, **variables: str):
        wanted = (SMALL if settings is None else settings).items()
        options = [word for key, value in wanted for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "utils", "run", "--profile", "demo", "--run-dir", str(path), *options, *words]
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": python_path(), **variables}
        self.path, self.lines = path, []
        self.stage = "00"  # at work
        self.began = time.monotonic()  # that stage, or the driver before the first one
        self._changes: list[float] = []  # moments of this stage at which something to go on from came on file
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            words = line.split()
            if words and ("unchanged" in line or words[0] == "✓"):
                number = words[0] if "unchanged" in line else words[1]
                self._changes, self.began, self.stage = [], time.monotonic(), f"{int(number) + 1:02}"

    def _watch(self) -> None:
        known = self._kept()
        while self.process.poll() is None:
            found = self._kept()
            if found != known:
                self._changes.append(time.monotonic())
                known = found
            time.sleep(0.02)

    def _kept(self) -> set[tuple[str, int]]:
        found = set()
        for pattern in KEPT:
            for file in self.path.glob(pattern):
                try:
                    found.add((str(file), file.stat().st_size))
                except FileNotFoundError:  # an old checkpoint, deleted at this moment
                    continue
        return found

    @property
    def place(self) -> str:
        """The stage at work, in words."""
        return "the report" if self.stage == "06" else self.stage

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait(self, timeout: float = 600) -> int:
        """The exit status, once it has ended and its output is read."""
        status = self.process.wait(timeout)
        self._reader.join(30)
        return status

    def wait_until(self, stage: str, seconds: float = 0.0, file: str = "") -> bool:
        """Until `stage` has been at work for so long, and `file` (a pattern) is there; False if the series ended first."""
        while self.process.poll() is None:
            at_work = self.stage > stage or (self.stage == stage and time.monotonic() - self.began >= seconds)
            if at_work and (not file or any(self.path.glob(file))):
                return True
            time.sleep(0.01)
        return False

    def everybody(self) -> list[psutil.Process]:
        """The driver, its kernel, and every process below them."""
        try:
            driver = psutil.Process(self.process.pid)
            return [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> float:
        """SIGKILL for everybody; returns the seconds of work that this costs.

        All of this attempt at the stage counts, start of the driver or the kernel and loading of the model included,
        less the stretch from the first to the last thing that it left to go on from. Nothing where the stage was done.
        """
        everybody = self.everybody()
        for one in everybody:
            if one.is_running():
                one.send_signal(signal.SIGKILL)
        now = time.monotonic()
        psutil.wait_procs(everybody, timeout=30)
        self.wait()
        return self.lost(now)

    def lost(self, now: float) -> float:
        """Seconds of work that an end at `now` costs; see `kill`."""
        if done(self.path, self.stage):
            return 0.0
        kept = self._changes[-1] - self._changes[0] if self._changes else 0.0
        return now - self.began - kept


def done(path: Path, number: str) -> bool:
    """Whether the manifest says that the stage `number` is done."""
    try:
        stages = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        return False
    return any(name.startswith(number) and record["state"] == "done" for name, record in stages.items())


def results(path: Path) -> dict[str, bytes]:
    """Metrics, adapter and merged model: what must be the same, bit for bit."""
    return {name: (path / name).read_bytes() for name in RESULTS}


def stage_seconds(path: Path) -> dict[str, float]:
    """{"03": seconds} as the manifest has them."""
    stages = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["stages"]
    return {name[:2]: record["seconds"] for name, record in stages.items()}
