"""A small demo as a process of its own that can be disturbed, and how many seconds of work that costs."""

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
SETTINGS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}  # two chains share two cores
RESULTS = ("comparison/metrics.json", "training/adapter/adapter_model.safetensors", "export/merged/model.safetensors")


class SeriesProcess:
    """`python -m utils run` on `path` in a process group of its own, followed from outside."""

    def __init__(self, path: Path, *words: str, **variables: str):
        command = [sys.executable, "-m", "utils", "run", "--profile", "demo", "--run-dir", str(path), *SETTINGS, *words]
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": python_path(), **variables}
        self.path, self.lines = path, []
        self.stage, self.began = "00", time.monotonic()  # at work, and since when
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            words = line.split()
            if words and ("unchanged" in line or words[0] == "✓"):
                number = words[0] if "unchanged" in line else words[1]
                self.began, self.stage = time.monotonic(), f"{int(number) + 1:02}"

    @property
    def place(self) -> str:
        """The stage at work, in words."""
        return "the report" if self.stage == "06" else self.stage

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait(self, timeout: float = 900) -> int:
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

    def kill(self) -> None:
        """SIGKILL for everybody."""
        everybody = self.everybody()
        for one in everybody:
            if one.is_running():
                one.send_signal(signal.SIGKILL)
        psutil.wait_procs(everybody, timeout=30)
        self.wait()


def results(path: Path) -> dict[str, bytes]:
    """Metrics, adapter and merged model: what must be the same, bit for bit."""
    return {name: (path / name).read_bytes() for name in RESULTS}


def stage_seconds(path: Path) -> dict[str, float]:
    """{"03": seconds} as the manifest has them."""
    stages = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["stages"]
    return {name[:2]: record["seconds"] for name, record in stages.items()}


def wait_for(condition, seconds: float = 120) -> bool:
    """Whether `condition` became true within `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def left_over(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still at work."""
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
