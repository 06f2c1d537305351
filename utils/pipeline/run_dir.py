"""The run directory: one folder that every notebook reads and writes, and its manifest of what was done.

`manifest.json` holds the profile, the overrides given so far, and for each stage its state (running, done, failed),
settings, seconds, peak memory, versions, and the sha256 of inputs and outputs. A stage is current, and need not run
again, while its settings, inputs, outputs and notebook are those on record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, StrictStr, ValidationError

from utils.config import absolute_overrides, expand_home, load_config
from utils.errors import RunDirError
from utils.files import (
    digests,
    fingerprint,
    is_folder,
    is_there,
    parse_json,
    record_files,
    relative_name,
    sha256,
    write_text,
)
from utils.hardware import default_profile, require_disk
from utils.pipeline.stages import BY_NAME, STAGES, Stage, ancestors
from utils.pipeline.state import read_state
from utils.project import command, embedded_fingerprint, runs_dir
from utils.schema import EMBEDDED, Config
from utils.sealed import open_seal, write_sealed

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


def _below(name: str) -> str:
    """A file's name as the manifest has it: one that points out of the run directory would be read, and uploaded."""
    if relative_name(name) is None:
        raise ValueError(f"{name!r} does not lie below the run directory")
    return name


def _stage(name: str) -> str:
    if name not in BY_NAME:
        raise ValueError(f"{name!r} is no stage of the series")
    return name


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class _File(_Part):
    sha256: StrictStr
    bytes: int = 0
    mtime_ns: int = 0


_Files = dict[Annotated[str, AfterValidator(_below)], _File]


class _Record(_Part):
    state: str = ""
    settings: dict[str, Any] = {}
    notebook: str = ""
    inputs: _Files = {}
    outputs: _Files = {}
    seconds: float = 0.0
    peak_memory: dict[str, float] = {}
    figures: dict[str, Any] = {}
    versions: dict[str, str | None] = {}
    computed_on: dict[str, str] = {}


class _Registered(_Part):
    changed_after_answers: bool


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")  # or a seal whose name lost a bit would pass for none

    profile: StrictStr
    overrides: dict[str, Any] = {}
    stages: dict[Annotated[str, AfterValidator(_stage)], _Record] = {}
    registered: _Registered | None = None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the run directory `path`; empty where there is none yet.

    Raises RunDirError where the file is there and cannot be read.
    """
    file = path / "manifest.json"
    try:
        if not file.exists():
            return {}
        manifest = open_seal(parse_json(file.read_text(encoding="utf-8")))
        json.dumps(manifest, allow_nan=False)  # what could not be written again is none of ours
        _Manifest.model_validate(manifest)
        return manifest
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg'].removeprefix('Value error, ')}"
    except (ValueError, OSError) as error:
        reason = str(error)
    raise RunDirError(
        f"{file} cannot be read ({reason}); restore it, take a new --run-dir, or delete it to run every stage again: "
        "nothing was changed."
    )


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


def require_recorded(path: Path, names: tuple[str, ...]) -> None:
    """Raise RunDirError for the first file among `names` (or below a folder there) that is not what its stage put on record.

    What no stage has on record is not judged.
    """
    for stage, record in read_manifest(path).get("stages", {}).items():
        for name, entry in record.get("outputs", {}).items():
            if not any(name == wanted or name.startswith(f"{wanted}/") for wanted in names):
                continue
            file = path / name
            if not file.is_file() or sha256(file) != entry["sha256"]:
                word = f"differs from what {stage} wrote" if file.is_file() else f"is missing, and {stage} wrote it"
                raise RunDirError(
                    f"{name} {word}; {command()} run --run-dir {path} makes it again, or bring the file back."
                )


def stale_on_record(manifest: Mapping[str, Any], last: Stage) -> str | None:
    """Why what `last` has on record is not the run's last word, by the manifest alone; None where it is.

    A collected run lies where neither its base model nor its checkpoints are, so that `RunDir.stale_because`, which
    looks at files, would call it stale: states, settings that were given, and recorded digests are compared instead.
    """
    records, written = manifest.get("stages", {}), {}
    for stage in (*ancestors(last), last):
        record = records.get(stage.name, {})
        if record.get("state") != "done":
            word = {"running": "was interrupted", "failed": "failed"}.get(record.get("state"), "has not run")
            return f"{stage.name} {word}"
        for key, value in manifest.get("overrides", {}).items():
            if _recorded_setting(record.get("settings", {}), key, value) != value:
                return f"{stage.name} is out of date: {key} was changed since"
        for name, entry in record.get("inputs", {}).items():
            if written.get(name, entry["sha256"]) != entry["sha256"]:
                return f"{stage.name} is out of date: {name} was written anew since"
        written |= {name: entry["sha256"] for name, entry in record.get("outputs", {}).items()}
    return None


def _recorded_setting(settings: Mapping[str, Any], key: str, default: Any) -> Any:
    """What a stage's record has under the dotted `key`; `default` where the stage does not rest on it."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):  # a record names whole sections, or section.key
        if (head := ".".join(parts[:end])) in settings:
            found = settings[head]
            for part in parts[end:]:
                found = found.get(part, default) if isinstance(found, Mapping) else default
            return found
    return default


def notebook_digest(stage: Stage) -> str:
    """sha256 over the notebook's cell sources, blind to outputs and ids; empty where it is not beside us."""
    if not stage.notebook.exists():
        return ""
    cells = json.loads(stage.notebook.read_text(encoding="utf-8"))["cells"]
    return hashlib.sha256("\0".join("".join(cell["source"]) for cell in cells).encode()).hexdigest()
