"""A stage at work: what it needs is checked, it is marked as running, and at its end its outputs are put on record."""

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils import hardware, progress
from utils.config import flatten, read_config
from utils.errors import RunDirError
from utils.files import is_folder, record_files, sweep_scratch
from utils.pipeline.lock import release_lock, take_lock
from utils.pipeline.run_dir import CONFIG, RunDir, notebook_digest, open_run
from utils.pipeline.stages import BY_NAME, Stage, ancestors
from utils.project import DRIVE, source_digest
from utils.schema import EMBEDDED
from utils.secrets import hide_secrets


@dataclass
class StageRun(RunDir):
    """A stage at work: opened by a notebook's first cells, finished by its last."""

    stage: Stage
    started: float = field(default_factory=time.monotonic)

    def pin(self, key: str, value: str | list | dict | None) -> None:
        """Keep a setting that was found out here, such as the commit behind a Hub id, in config.yaml."""
        if value is not None:
            self.config = read_config(self.file(CONFIG), {key: value})
            self.save()
            self.write_record(self.stage, **{**self.record(self.stage), "settings": self.settings(self.stage)})

    def finish(self, peak: dict[str, float] | None = None, **figures: float | int | str) -> None:
        """Hash what was written and mark the stage done, with `figures` and another process's `peak` memory."""
        missing = [name for name in self.stage.outputs if not self.file(name).exists()]
        if missing:
            raise RunDirError(f"{self.stage.name} did not write {', '.join(missing)}; run all of its cells.")
        settings = flatten(self.config.model_dump(mode="json"))
        seeds = {key: value for key, value in settings.items() if key.endswith(".seed")}
        seconds, outputs = time.monotonic() - self.started, (*self.stage.outputs, *self.stage.optional)
        loading = sys.modules.get("utils.models.load")  # by the stages that load no model it is not imported
        record = self.record(self.stage) | {
            "state": "done",
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "peak_memory": hardware.peak_memory() | (peak or {}),
            "figures": figures,
            "model_loads": dict(loading.LOADS) if loading else {},
            "provenance": {"seeds": seeds, **hardware.describe_determinism()},
            "outputs": record_files(self.path, outputs),
        }
        self.write_record(self.stage, **record)
        release_lock(self.path, self.stage.name)
        print(f"{self.stage.name} done in {seconds:.0f} s; written to {self.path}:")
        for name, entry in record["outputs"].items():
            print(f"  {name}  ({entry['bytes'] / 1024:,.1f} KiB)")


def open_stage(
    name: str, profile: str = "auto", run_dir: str | Path = "", overrides: Mapping[str, Any] | None = None
) -> StageRun:
    """Open a stage for work: check what it needs, then mark it as running.

    Raises RunDirError where an earlier stage is not current or another process is at work, HardwareError, ConfigError.
    """
    hide_secrets()
    stage, run = BY_NAME[name], open_run(profile, run_dir, overrides)
    if run.path.is_dir():
        take_lock(run.path, name)
    try:
        return _begin(run, stage)
    except BaseException:
        release_lock(run.path, name)
        raise


def _begin(run: RunDir, stage: Stage) -> StageRun:
    require_ancestors(run, stage)
    require_hardware(run, stage)
    computed_on = hardware.resolve_hardware(run.config.hardware)
    before = run.record(BY_NAME["01_baseline_inference"]).get("computed_on", {})
    if stage.name == "04_comparison" and before != computed_on:  # it would be compared as fine-tuning
        there, here = (", ".join(found.values()) for found in (before, computed_on))
        again = f"go on there, or delete {run.file('baseline')} and run 01_baseline_inference again"
        raise RunDirError(f"The baseline was answered on {there}, this is {here}; {again}.")
    take_lock(run.path, stage.name)  # which makes the folder: only now that nothing stands against it
    sweep_scratch(run.path)
    run.save()
    opened = StageRun(run.path, run.config, stage)
    packages = ("torch", *hardware.STACK, *hardware.CUDA_STACK)
    opened.write_record(
        stage,
        state="running",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        settings=run.settings(stage),
        notebook=notebook_digest(stage),
        sources=source_digest(),
        versions={package: hardware.installed(package) for package in packages},
        computed_on=computed_on,
        inputs=record_files(run.path, stage.inputs),
        outputs={},
    )
    progress.report_to(run.path)
    return opened


def require_ancestors(run: RunDir, stage: Stage) -> None:
    """Raise RunDirError unless every stage that this one rests on is done and current."""
    if found := run.first_stale(ancestors(stage)):
        needed, reason = found
        first = f"run notebooks/{needed.name}.ipynb first, with the same PROFILE, RUN_DIR and OVERRIDES"
        raise RunDirError(f"{stage.name} needs {needed.name}, but {reason} in {run.path}; {first}.")


def require_hardware(run: RunDir, stage: Stage) -> None:
    """Raise HardwareError where this machine lacks what the profile asks for."""
    wanted, profile = run.config.hardware, run.config.profile
    if wanted.device == "cuda" and stage.name != "02_dataset_formatting":
        hardware.require_gpu(profile, wanted.min_gpu_memory_gib)
    if stage.name == "00_setup":
        large = Path(tempfile.gettempdir()) if run.path.is_relative_to(DRIVE) else run.path  # Drive gets no weights
        hardware.require_disk(large, wanted.min_disk_gib, f"The profile {profile}")
        if run.config.model.name != EMBEDDED and not is_folder(run.config.model.name):
            hardware.require_disk(hardware.hub_cache(), wanted.min_cache_gib, "The base model's download")
