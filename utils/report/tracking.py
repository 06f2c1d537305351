"""Experiment tracking with wandb: offline by default, online where a key is found, never a reason to stop."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.pipeline.stage import StageRun
from utils.secrets import find_secret

_TIMEOUT_S = 20  # wandb itself waits 90 s for a server that does not answer, and then raises


class Tracker:
    """One wandb run for one stage, or nothing; `log`, `table`, `image`, `finish` are safe to call either way."""

    def __init__(self, run: StageRun, job_type: str):
        self._wandb_run, self._broken, self.mode = None, False, "disabled"
        wished = run.config.tracking.mode
        if wished == "disabled":
            return
        key = find_secret("WANDB_API_KEY") if wished == "auto" else None
        mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")  # wandb's own switch comes first
        if key and mode == "online":
            os.environ["WANDB_API_KEY"] = key.value
            self._start(run, job_type, "online")
        if self._wandb_run is None:
            self._start(run, job_type, "offline" if mode == "online" else mode)
        files = f", files in {run.file('tracking') / 'wandb'}" if self.mode == "offline" else ""
        print(f"tracking: wandb {self.mode}{files}")

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars."""
        self._send(lambda wandb: self._wandb_run.log(dict(values), step=step))

    def table(self, name: str, frame) -> None:
        """Log a pandas DataFrame as a table."""
        self._send(lambda wandb: self._wandb_run.log({name: wandb.Table(dataframe=frame)}))

    def image(self, name: str, path: Path) -> None:
        """Log a figure from a file."""
        self._send(lambda wandb: self._wandb_run.log({name: wandb.Image(str(path))}))

    def finish(self) -> None:
        """Close the run; offline runs can be sent later with `python -m utils publish` or `wandb sync`."""
        self._broken = False  # what was logged before a trouble is kept
        self._send(lambda wandb: self._wandb_run.finish())
        self._wandb_run = None

    def _start(self, run: StageRun, job_type: str, mode: str) -> None:
        def init(wandb):
            run.file("tracking").mkdir(parents=True, exist_ok=True)
            return wandb.init(
                project=run.config.tracking.project, group=f"{run.config.profile}-{run.path.name}",
                name=f"{run.path.name}-{run.stage.number}", job_type=job_type, mode=mode,
                config=run.config.model_dump(mode="json"), dir=str(run.file("tracking")),
                settings=wandb.Settings(
                    init_timeout=_TIMEOUT_S, finish_timeout=_TIMEOUT_S, console="off", disable_git=True, disable_code=True,
                ),
            )  # fmt: skip

        self._wandb_run = self._attempt(init, f"{mode} tracking")
        self.mode = mode if self._wandb_run else self.mode

    def _send(self, action: Callable[[Any], Any]) -> None:
        if self._wandb_run is not None and not self._broken:  # after the first trouble nothing more is logged
            self._attempt(action, "tracking")

    def _attempt(self, action: Callable[[Any], Any], what: str) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            return action(wandb)
        except Exception as error:  # whatever wandb raises must not cost a training run
            print(f"{what} failed ({type(error).__name__}); the run goes on without it.")
            self._broken = self._wandb_run is not None
            return None
