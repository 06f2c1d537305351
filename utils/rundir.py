"""The run directory: one folder that every notebook reads and writes, and its manifest of what was done.

`manifest.json` holds the profile, the overrides given so far, and for each stage its state (running, done, failed),
settings, seconds, peak memory, versions, and the sha256 of inputs and outputs. A stage is current, and need not run
again, while its settings, inputs, outputs and notebook are those on record.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils.config import absolute_overrides, expand_home, is_there, load_config
from utils.errors import RunDirError, StageOrderError
from utils.files import digests, fingerprint, record_files, sha256, write_json, write_text
from utils.platforms import (
    CUDA_STACK,
    STACK,
    default_profile,
    hub_cache,
    installed,
    peak_memory,
    quiet_libraries,
    require_disk,
    require_gpu,
    resolve_hardware,
)
from utils.project import embedded_fingerprint, runs_dir, source_digest
from utils.settings import EMBEDDED, Config
from utils.stages import BY_NAME, STAGES, Stage, ancestors
from utils.state import read_state

_HEADER = "# Written by the series: the settings in force. To change one, edit the profile or pass --set / OVERRIDES.\n"


@dataclass
class RunDir:
    """A run directory with its configuration."""

    path: Path
    config: Config
    overrides: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write manifest and config.yaml; raises RunDirError where the directory cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.manifest_path, {**self._known(), "stages": self.manifest().get("stages", {})})
            write_text(self.path / "config.yaml", _HEADER + self.config.to_yaml())
        except OSError as error:
            raise RunDirError(f"{self.path} cannot be written ({error.strerror}); choose another RUN_DIR.") from None

    def _known(self) -> dict[str, Any]:
        return {"profile": self.config.profile, "overrides": self.overrides, "stages": {}}

    def file(self, relative: str) -> Path:
        """The absolute path of `relative` below the run directory."""
        return self.path / relative

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk now."""
        return read_manifest(self.path)

    def record(self, stage: Stage) -> dict[str, Any]:
        """What the manifest knows of a stage; empty if nothing."""
        return self.manifest().get("stages", {}).get(stage.name, {})

    def write_record(self, stage: Stage, **values: Any) -> None:
        """Replace a stage's manifest entry."""
        manifest = self._known() | self.manifest()
        manifest["stages"][stage.name] = values
        manifest["stages"] = dict(sorted(manifest["stages"].items()))
        write_json(self.manifest_path, manifest)

    def settings(self, stage: Stage) -> dict[str, Any]:
        """The settings that this stage's result rests on, local data and model named by their content."""
        values = self.config.sections(*stage.settings)
        # What changes no result must not make hours of work stale.
        for section, keys in (("train", ("save_steps", "logging_steps", "fit")), ("generate", ("batch_size",))):
            for key in keys if section in values else ():
                del values[section][key]
        if "data" in values:
            files = [("data", self.config.data.path), ("benchmark", self.config.evaluate.benchmark.path)]
            files += [(f"benchmark {i}", s.path) for i, s in enumerate(self.config.evaluate.more_benchmarks, start=2)]
            for label, path in files:
                if path is not None and is_there(path):
                    values[f"{label} file"] = fingerprint(path)
        if "model" in values:
            folder = Path(self.config.model.name)
            if self.config.model.name == EMBEDDED:
                values["model files"] = embedded_fingerprint()
            elif folder.is_dir():
                values["model files"] = fingerprint(folder)
        return values

    def stale_because(self, stage: Stage, with_notebook: bool = True) -> str | None:
        """Why a stage has to run (again), in words; None while it is current."""
        record = self.record(stage)
        if record.get("state") != "done":
            return {"running": "it was interrupted", "failed": "it failed"}.get(record.get("state"), "it has not run")
        if record["settings"] != self.settings(stage):
            changed = [key for key, value in self.settings(stage).items() if record["settings"].get(key) != value]
            return f"its settings changed ({', '.join(changed) or 'one was dropped'})"
        if with_notebook and record["notebook"] != notebook_digest(stage):
            return "its notebook changed"
        for kind, relatives in (("input", stage.inputs), ("output", (*stage.outputs, *stage.optional))):
            found = digests(record_files(self.path, relatives, record[f"{kind}s"]))
            if found != digests(record[f"{kind}s"]):
                return f"one of its {kind}s changed"
        return None

    def first_stale(self, stages: Iterable[Stage]) -> tuple[Stage, str] | None:
        """The first of `stages` whose result cannot be relied on, and why; None while all are done and current.

        A notebook that was edited since makes no result wrong, and is passed over.
        """
        reasons = ((stage, self.stale_because(stage, with_notebook=False)) for stage in stages)
        return next(((stage, reason) for stage, reason in reasons if reason), None)


@dataclass
class StageRun(RunDir):
    """A stage at work: opened by a notebook's first cells, finished by its last."""

    stage: Stage = STAGES[0]
    started: float = field(default_factory=time.monotonic)

    def pin(self, key: str, value: str | list | None) -> None:
        """Keep a setting that was found out here, such as the commit behind a Hub id, for every later stage."""
        if value is not None:
            self.overrides = {**self.overrides, key: value}
            self.config = load_config(self.config.profile, self.overrides)
            self.save()
            self.write_record(self.stage, **{**self.record(self.stage), "settings": self.settings(self.stage)})

    def finish(self, peak: dict[str, float] | None = None, **figures: float | int | str) -> None:
        """Hash what was written and mark the stage done; `figures` are kept in the manifest beside it.

        `peak` is the peak memory of the process that did the work, where it was another than this one.
        """
        missing = [name for name in self.stage.outputs if not self.file(name).exists()]
        if missing:
            raise StageOrderError(
                f"{self.stage.name} did not write {', '.join(missing)}; run all of its cells, from the first."
            )
        record = self.record(self.stage)
        record.update(
            state="done",
            finished=_now(),
            seconds=round(time.monotonic() - self.started, 1),
            peak_memory=peak_memory() | (peak or {}),
            figures=figures,
            outputs=record_files(self.path, (*self.stage.outputs, *self.stage.optional)),
        )
        self.write_record(self.stage, **record)
        print(f"{self.stage.name} done in {record['seconds']:.0f} s; written to {self.path}:")
        for name, entry in record["outputs"].items():
            print(f"  {name}  ({_size(entry['bytes'])})")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the run directory `path`; empty where there is none yet.

    Raises RunDirError where the file is there and cannot be read.
    """
    file = path / "manifest.json"
    if not file.exists():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or "profile" not in manifest:
            raise ValueError("no profile")
        return manifest
    except (ValueError, OSError) as error:
        raise RunDirError(
            f"{file} cannot be read ({error}); restore it, or take a new --run-dir: nothing was changed."
        ) from None


def open_run(
    profile: str = "auto",
    run_dir: str | Path = "",
    overrides: Mapping[str, Any] | None = None,
    forget: bool = False,
) -> RunDir:
    """The run directory with its configuration in force: profile, then earlier overrides, then `overrides`.

    With `forget`, earlier overrides are dropped.

    `profile` "auto" is the run directory's own, or demo without a CUDA GPU and t4 with one. `run_dir` "" is
    runs/<profile> in the checkout (/kaggle/working/runs on Kaggle). Nothing is written: `save` does that.

    Raises ConfigError and RunDirError.
    """
    if not run_dir:
        profile = default_profile() if profile == "auto" else profile
        run_dir = runs_dir() / profile
    path = expand_home(run_dir, "RUN_DIR").resolve()
    manifest = read_manifest(path)
    if profile == "auto":
        profile = manifest.get("profile") or default_profile()
    if manifest and manifest["profile"] != profile:
        raise RunDirError(
            f"{path} holds a run of the profile {manifest['profile']}, not {profile}; "
            f"name another RUN_DIR, or use PROFILE = {manifest['profile']!r}."
        )
    load_config(profile, overrides)  # a message about what was just typed, before any about what was stored
    given = {**({} if forget else manifest.get("overrides", {})), **absolute_overrides(overrides or {})}
    config = load_config(profile, given)
    require_disk(path, 0.1, "A run directory")
    return RunDir(path, config, {key: _plain_value(config, key) for key in given})


def _plain_value(config: Config, dotted: str) -> Any:
    """A setting as validated, in plain JSON values, so that it can be stored."""
    value = config.model_dump(mode="json")
    for part in dotted.split("."):
        value = value[part]
    return value


def open_stage(
    name: str, profile: str = "auto", run_dir: str | Path = "", overrides: Mapping[str, Any] | None = None
) -> StageRun:
    """Open a stage for work: check what it needs, then mark it as running.

    Raises StageOrderError where an earlier stage has not run or is out of date, HardwareError where the machine lacks
    what the profile asks for, and what `open_run` raises.
    """
    quiet_libraries()
    stage = BY_NAME[name]
    run = open_run(profile, run_dir, overrides)
    require_ancestors(run, stage)
    require_hardware(run, stage)
    computed_on = resolve_hardware(run.config.hardware)
    if name == "04_comparison":
        _require_same_conditions(run, computed_on)
    run.save()  # only now that nothing stands against it
    opened = StageRun(run.path, run.config, run.overrides, stage)
    opened.write_record(
        stage,
        state="running",
        started=_now(),
        settings=run.settings(stage),
        notebook=notebook_digest(stage),
        sources=source_digest(),
        versions={package: installed(package) for package in ("torch", *STACK, *CUDA_STACK)},
        computed_on=computed_on,
        inputs=record_files(run.path, stage.inputs),
        outputs={},
    )
    return opened


def require_ancestors(run: RunDir, stage: Stage) -> None:
    """Raise StageOrderError unless every stage that this one rests on is done and current."""
    if found := run.first_stale(ancestors(stage)):
        needed, reason = found
        raise StageOrderError(
            f"{stage.name} needs {needed.name}, but {reason} in {run.path}; run notebooks/{needed.name}.ipynb first, "
            f"with the same PROFILE and RUN_DIR."
        )


def require_hardware(run: RunDir, stage: Stage) -> None:
    """Raise HardwareError where this machine lacks what the profile asks for."""
    hardware, profile = run.config.hardware, run.config.profile
    if hardware.device == "cuda" and stage.name != "02_dataset_formatting":
        require_gpu(profile, hardware.min_gpu_memory_gib)
    if stage.name == "00_setup":
        require_disk(run.path, hardware.min_disk_gib, f"The profile {profile}")
        if run.config.model.name != EMBEDDED and not Path(run.config.model.name).is_dir():
            require_disk(hub_cache(), hardware.min_cache_gib, "The base model's download")


def _require_same_conditions(run: RunDir, now: dict[str, str]) -> None:
    """Both arms must compute alike: another backend or dtype in 04 than in 01 would be compared as fine-tuning."""
    before = run.record(BY_NAME["01_baseline_inference"]).get("computed_on")
    if before != now:
        raise StageOrderError(
            f"The baseline was answered on {_words(before)}, this is {_words(now)}; run 01_baseline_inference here again, "
            "so that both arms answer under the same conditions."
        )


def _words(computed_on: dict[str, str] | None) -> str:
    return ", ".join((computed_on or {}).values())


def altered_files(path: Path) -> list[str]:
    """Rehash every output on record and name those that are missing or differ; an empty list is a clean bill.

    What state.json says stayed in a session's scratch is not missed.
    """
    altered, state = [], read_state(path)
    for record in read_manifest(path).get("stages", {}).values():
        for name, entry in record.get("outputs", {}).items():
            file = path / name
            if not file.is_file():
                if state is None or not state.left(name):
                    altered.append(f"{name} is missing")
            elif sha256(file) != entry["sha256"]:
                altered.append(f"{name} differs from what was written")
    return altered


def notebook_digest(stage: Stage) -> str:
    """sha256 over the notebook's cell sources, blind to outputs and ids; empty where it is not beside us."""
    if not stage.notebook.exists():
        return ""
    cells = json.loads(stage.notebook.read_text(encoding="utf-8"))["cells"]
    return hashlib.sha256("\0".join("".join(cell["source"]) for cell in cells).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
