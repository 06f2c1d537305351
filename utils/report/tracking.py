"""Experiment tracking with wandb: offline by default, online where a key is found, never a reason to stop.

Every call into wandb goes through `Tracker._try`: the first trouble is printed in one line and nothing more is logged from
then on; what was logged before is still closed and kept. The Trainer's own integration (report_to="wandb") is not used
because its errors end the training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.pipeline.stage import StageRun
from utils.secrets import find_secret

_INIT_TIMEOUT_S = 20  # wandb itself waits 90 s for a server that does not answer, and then raises


class Tracker:
    """One wandb run for one stage, or nothing; `log`, `table`, `image`, `finish` are safe to call either way."""

    def __init__(self, run: StageRun, job_type: str):
        self._wandb_run, self._broken = None, False
        self.mode = "disabled"
        if run.config.tracking.mode == "disabled":
            return
        key = find_secret("WANDB_API_KEY") if run.config.tracking.mode == "auto" else None
        folder = run.file("tracking")
        # WANDB_MODE is wandb's own switch; who sets it means it.
        wished = os.environ.get("WANDB_MODE")
        modes = ["online", "offline"] if key and wished in (None, "online") else [wished or "offline"]
        modes = ["offline"] if modes == ["online"] else modes
        for mode in modes:
            if key and mode == "online":
                os.environ["WANDB_API_KEY"] = key.value
            self._wandb_run = self._try(lambda mode=mode: _start(run, job_type, folder, mode), f"{mode} tracking")
            if self._wandb_run is not None:
                self.mode = mode
                break
        print(f"tracking: wandb {self.mode}" + (f", files in {folder / 'wandb'}" if self.mode == "offline" else ""))

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars."""
        self._send(lambda: self._wandb_run.log(dict(values), step=step))

    def table(self, name: str, frame) -> None:
        """Log a pandas DataFrame as a table."""
        self._send(lambda: self._wandb_run.log({name: _wandb().Table(dataframe=frame)}))

    def image(self, name: str, path: Path) -> None:
        """Log a figure from a file."""
        self._send(lambda: self._wandb_run.log({name: _wandb().Image(str(path))}))

    def finish(self) -> None:
        """Close the run; offline runs can be sent later with `python -m utils publish` or `wandb sync`."""
        if self._wandb_run is not None:
            self._try(lambda: self._wandb_run.finish(), "tracking")
        self._wandb_run = None

    def _send(self, action: Callable[[], Any]) -> None:
        if self._wandb_run is not None and not self._broken:
            self._try(action, "tracking")

    def _try(self, action: Callable[[], Any], what: str) -> Any:
        try:
            return action()
        except Exception as error:  # whatever wandb raises must not cost a training run
            if not self._broken:
                print(f"{what} failed ({type(error).__name__}); the run goes on without it.")
            self._broken = self._wandb_run is not None
            return None


def _wandb():
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb


def _start(run: StageRun, job_type: str, folder: Path, mode: str):
    wandb = _wandb()
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=run.config.tracking.project,
        group=f"{run.config.profile}-{run.path.name}",
        name=f"{run.path.name}-{run.stage.number}",
        job_type=job_type,
        config=run.config.model_dump(mode="json"),
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_INIT_TIMEOUT_S,
            console="off",
            disable_git=True,
            disable_code=True,
        ),
    )
