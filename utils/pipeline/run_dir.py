"""The run directory: one folder that every notebook reads and writes, and its manifest of what was done.

`manifest.json` holds the profile, the overrides given so far, and for each stage its state (running, done, failed),
settings, seconds, peak memory, versions, and the sha256 of inputs and outputs. A stage is current, and need not run
again, while its settings, inputs, outputs and notebook are those on record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.config import absolute_overrides, expand_home, load_config
from utils.errors import RunDirError
from utils.files import digests, fingerprint, is_folder, is_there, record_files, write_text
from utils.hardware import default_profile, require_disk
from utils.pipeline.manifest import notebook_digest, read_manifest
from utils.pipeline.stages import STAGES, Stage
from utils.project import embedded_fingerprint, runs_dir
from utils.schema import EMBEDDED, Config
from utils.sealed import write_sealed

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
            write_sealed(self.manifest_path, {"stages": {}} | self.manifest() | self._settings())
            write_text(self.path / "config.yaml", _HEADER + self.config.to_yaml())
        except OSError as error:
            raise RunDirError(f"{self.path} cannot be written ({error.strerror}); choose another RUN_DIR.") from None

    def _settings(self) -> dict[str, Any]:
        return {"profile": self.config.profile, "overrides": self.overrides}

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
        stages = self.manifest().get("stages", {}) | {stage.name: values}
        self.note("stages", dict(sorted(stages.items())))

    def note(self, key: str, value: Any) -> None:
        """Replace one entry of the manifest; None takes it out."""
        manifest = self._settings() | {"stages": {}} | self.manifest() | {key: value}
        write_sealed(self.manifest_path, {name: entry for name, entry in manifest.items() if entry is not None})

    def settings(self, stage: Stage) -> dict[str, Any]:
        """The settings that this stage's result rests on, local data and model named by their content."""
        values = self.config.sections(*stage.settings)
        # What changes no result must not make hours of work stale.
        for section, keys in (("train", ("save_steps", "logging_steps", "step_plan")), ("generate", ("batch_size",))):
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
            elif is_folder(folder):
                values["model files"] = fingerprint(folder)
        return values

    def stale_because(self, stage: Stage, with_notebook: bool = True) -> str | None:
        """Why a stage has to run (again), in words; None while it is current."""
        record = self.record(stage)
        if record.get("state") != "done":
            return {"running": "it was interrupted", "failed": "it failed"}.get(record.get("state"), "it has not run")
        before, now = record.get("settings", {}), self.settings(stage)
        if before != now:
            changed = [key for key, value in now.items() if before.get(key) != value]
            return f"its settings changed ({', '.join(changed) or 'one was dropped'})"
        if with_notebook and record.get("notebook") != notebook_digest(stage):
            return "its notebook changed"
        for kind, relatives in (("input", stage.inputs), ("output", (*stage.outputs, *stage.optional))):
            known = record.get(f"{kind}s", {})
            if told := describe_changes(digests(known), digests(record_files(self.path, relatives, known))):
                return f"one of its {kind}s changed ({told})"
        return None

    def first_stale(self, stages: Iterable[Stage]) -> tuple[Stage, str] | None:
        """The first of `stages` whose result cannot be relied on, and why; None while all are done and current.

        A notebook that was edited since makes no result wrong, and is passed over.
        """
        reasons = ((stage, self.stale_because(stage, with_notebook=False)) for stage in stages)
        return next(((stage, reason) for stage, reason in reasons if reason), None)


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
    if not manifest and (found := _somebody_elses(path)):
        raise RunDirError(
            f"{path} holds {found}, but no run of this series, and would lose it; name another run directory."
        )
    if profile == "auto":
        profile = manifest.get("profile") or default_profile()
    if manifest and manifest["profile"] != profile:
        raise RunDirError(
            f"{path} holds a run of the profile {manifest['profile']}, not {profile}; "
            f"name another run directory, or the profile {manifest['profile']}."
        )
    load_config(profile, overrides)  # a message about what was just typed, before any about what was stored
    given = {**({} if forget else manifest.get("overrides", {})), **absolute_overrides(overrides or {})}
    config = load_config(profile, given)
    require_disk(path, 0.1, "A run directory")
    return RunDir(path, config, {key: _plain_value(config, key) for key in given})


def _somebody_elses(path: Path) -> str | None:
    """A file or folder in `path` that a run would write over, where nothing says that a run wrote it; None otherwise.

    A run whose manifest was deleted is known by its state.json, or by the head of its config.yaml.
    """
    settings = path / "config.yaml"
    if is_there(path / "state.json"):
        return None
    if is_there(settings) and settings.is_file() and settings.read_bytes().startswith(_HEADER.splitlines()[0].encode()):
        return None
    written = (
        "config.yaml",
        *(name for stage in STAGES for name in (*stage.outputs, *stage.optional)),
        "report/index.html",
    )
    return next((name for name in written if is_there(path / name)), None)


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first file whose digest is another one, in words, and how many more there are; empty where none is."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if not names:
        return ""
    first = names[0]
    word = "is missing" if first not in now else "differs from what was written" if first in before else "was added"
    return f"{first} {word}" + (f", and {len(names) - 1} more" if len(names) > 1 else "")


def _plain_value(config: Config, dotted: str) -> Any:
    """A setting as validated, in plain JSON values, so that it can be stored."""
    value = config.model_dump(mode="json")
    for part in dotted.split("."):
        value = value[part]
    return value
