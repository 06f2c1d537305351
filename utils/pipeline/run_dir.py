"""The run directory: one folder that every notebook reads and writes.

`config.yaml` holds the settings in force, `manifest.json` what each stage rests on and wrote, `state.json` how the run
stands. A stage is current, and need not run again, while its settings, inputs, outputs and notebook are those on record.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, StrictStr, ValidationError

from utils import files
from utils.config import absolute_overrides, expand_home, found_by_setup, load_config, read_config
from utils.errors import ConfigError, RunDirError
from utils.hardware import default_profile, require_disk
from utils.pipeline.stages import BY_NAME, Stage, ancestors
from utils.project import command, embedded_fingerprint, runs_dir
from utils.schema import EMBEDDED, Config

CONFIG, STATE = "config.yaml", "state.json"
_HEAD = "# Written by the series: the settings in force."
_HEADER = f"{_HEAD} Edit one here, or pass --set / OVERRIDES: what rests on it runs again.\n"
_MISSING, _DIFFERS = "is missing", "differs from what was written"
# These change no result: hours of work stay.
_NO_RESULT = {
    "train": {"save_steps", "logging_steps", "step_plan"},
    "generate": {"batch_size"},
    "export": {"push_to_hub"},
}


@dataclass
class RunDir:
    """A run directory with its configuration."""

    path: Path
    config: Config

    def save(self) -> None:
        """Write config.yaml and manifest; raises RunDirError where the directory cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stored = None
            with suppress(ConfigError):
                stored = read_config(self.file(CONFIG))
            if stored != self.config:  # else it stays as somebody may have written it
                files.write_text(self.file(CONFIG), _HEADER + self.config.to_yaml())
            # The manifest last: with it a run has begun, and its config.yaml is there.
            files.write_json(self.manifest_path, {"profile": self.config.profile, "stages": {}} | self.manifest())
        except OSError as error:
            raise RunDirError(f"{self.path} cannot be written ({error.strerror}); choose another RUN_DIR.") from None

    def file(self, relative: str) -> Path:
        return self.path / relative

    @property
    def manifest_path(self) -> Path:
        return self.file("manifest.json")

    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.path)

    def record(self, stage: Stage) -> dict[str, Any]:
        """What the manifest knows of a stage; empty if nothing."""
        return self.manifest().get("stages", {}).get(stage.name, {})

    def write_record(self, stage: Stage, **values: Any) -> None:
        """Replace a stage's manifest entry; without `values` the stage counts as not run."""
        manifest = {"profile": self.config.profile, "stages": {}} | self.manifest()
        manifest["stages"] = dict(sorted((manifest["stages"] | {stage.name: values}).items()))
        files.write_json(self.manifest_path, manifest)

    def settings(self, stage: Stage) -> dict[str, Any]:
        """The settings that this stage's result rests on; local data and model by their content."""
        values = self.config.sections(*stage.settings, exclude=_NO_RESULT)
        local = {}
        if "data" in values:
            benchmarks = (self.config.evaluate.benchmark, *self.config.evaluate.more_benchmarks)
            local = {f"benchmark {number} file": each.path for number, each in enumerate(benchmarks, start=1)}
            local["data file"] = self.config.data.path
        if "model" in values:
            local["model files"] = Path(self.config.model.name)
        values |= {label: files.fingerprint(path) for label, path in local.items() if path and files.is_there(path)}
        if "model" in values and self.config.model.name == EMBEDDED:
            values["model files"] = embedded_fingerprint()
        return values

    def stale_because(self, stage: Stage, with_notebook: bool = True, with_outputs: bool = True) -> str | None:
        """Why a stage has to run (again), in words; None while it is current, as far as data and model are at hand."""
        record = self.record(stage)
        if record.get("state") != "done":
            return {"running": "it was interrupted", "failed": "it failed"}.get(record.get("state"), "it has not run")
        before, now = record.get("settings", {}), self.settings(stage)
        if changed := [key for key, value in now.items() if before.get(key) != value]:
            return f"its settings changed ({', '.join(changed)})"
        if with_notebook and record.get("notebook") != notebook_digest(stage):
            return "its notebook changed"
        relatives = {"input": stage.inputs, "output": (*stage.outputs, *stage.optional) if with_outputs else ()}
        for kind, names in relatives.items():
            known = record.get(f"{kind}s", {}) if names else {}
            found = files.record_files(self.path, names, known)
            before, now = files.digests(known), files.digests(found)
            if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
                there = "was written anew" if kind == "input" else _DIFFERS
                word = "was added" if changed[0] not in before else there if changed[0] in now else _MISSING
                more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
                return f"one of its {kind}s changed ({changed[0]} {word}{more})"
        return None

    def first_stale(self, stages: Iterable[Stage]) -> tuple[Stage, str] | None:
        """The first of `stages` whose result cannot be relied on, and why; an edited notebook makes no result wrong."""
        reasons = ((stage, self.stale_because(stage, with_notebook=False)) for stage in stages)
        return next(((stage, reason) for stage, reason in reasons if reason), None)

    def out_of_date(self, stage: Stage) -> str | None:
        """Why what `stage` wrote is not this run's last word; its outputs themselves are the caller's to look at."""
        found = self.first_stale(ancestors(stage))
        if found is None and (reason := self.stale_because(stage, with_notebook=False, with_outputs=False)):
            found = stage, reason
        return f"{found[0].name} is out of date: {found[1]}" if found else None


def open_run(
    profile: str = "auto", run_dir: str | Path = "", overrides: Mapping | None = None, fresh=False, keep_found=False
) -> RunDir:
    """The run directory with its settings in force: config.yaml, or the profile where the run begins, with `overrides`.

    `profile` "auto" is the run directory's own, or demo without a CUDA GPU and t4 with one. `fresh` reads the profile
    again; with `keep_found`, what 00 found out stays. Nothing is written: `save` does that. Raises ConfigError and
    RunDirError.
    """
    if not run_dir:
        profile = default_profile() if profile == "auto" else profile
        run_dir = runs_dir() / profile
    path = expand_home(run_dir, "RUN_DIR").resolve()
    manifest = read_manifest(path)
    if not manifest and (path / CONFIG).is_file() and not (path / CONFIG).read_bytes().startswith(_HEAD.encode()):
        raise RunDirError(f"{path} holds a {CONFIG} that no run of this series wrote; name another run directory.")
    if profile == "auto":
        profile = manifest.get("profile") or default_profile()
    if manifest and manifest["profile"] != profile:
        found = f"{path} holds a run of the profile {manifest['profile']}, not {profile}"
        raise RunDirError(f"{found}; name another run directory, or the profile {manifest['profile']}.")
    given = absolute_overrides(overrides)
    config = read_config(path / CONFIG, given) if manifest and not fresh else load_config(profile, given)
    if manifest and fresh and keep_found:
        config = load_config(profile, given | found_by_setup(read_config(path / CONFIG), config))
    require_disk(path, 0.1, "A run directory")
    return RunDir(path, config)


def _below(name: str) -> str:
    """A file's name as the manifest has it: one that points out of the run directory would be read, and uploaded."""
    if files.relative_name(name) is None:
        raise ValueError(f"{name!r} does not lie below the run directory")
    return name


class _File(BaseModel, extra="allow"):
    sha256: StrictStr


_Files = dict[Annotated[str, AfterValidator(_below)], _File]


class _Record(BaseModel, extra="allow"):
    state: str = ""
    settings: dict[str, Any] = {}
    inputs: _Files = {}
    outputs: _Files = {}


class _Manifest(BaseModel, extra="allow"):
    profile: StrictStr
    stages: dict[Literal[tuple(BY_NAME)], _Record] = {}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run directory, empty where there is none yet; raises RunDirError where it cannot be read."""
    file = path / "manifest.json"
    try:
        if not file.exists():
            return {}
        manifest = files.read_json(file)
        _Manifest.model_validate(manifest)
        return manifest
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg'].removeprefix('Value error, ')}"
    except (ValueError, OSError) as error:
        reason = str(error)
    raise RunDirError(f"{file} cannot be read ({reason}); restore it, or delete it to run all again by the profile.")


def altered_files(path: Path) -> list[str]:
    """Rehash every output on record and name those that are missing or differ; an empty list is a clean bill."""
    return [f"{name} {word}" for _, name, word in _altered(path)]


def require_recorded(path: Path, names: tuple[str, ...]) -> None:
    """Raise RunDirError for the first recorded file among or below `names` that is not as its stage left it."""
    for stage, name, word in _altered(path, names):
        word = f"{word}, and {stage} wrote it" if word == _MISSING else f"differs from what {stage} wrote"
        again = command("run", "--run-dir", path)
        raise RunDirError(f"{name} {word}; {again} makes it again, or bring the file back.")


def _altered(path: Path, below: tuple[str, ...] = ("",)) -> Iterator[tuple[str, str, str]]:
    """(stage, output, what became of it) of the outputs on record below those names that changed since."""
    for stage, record in read_manifest(path).get("stages", {}).items():
        for name, entry in record.get("outputs", {}).items():
            if not any(given in ("", name) or name.startswith(f"{given}/") for given in below):
                continue
            if not (path / name).is_file():
                yield stage, name, _MISSING
            elif files.sha256(path / name) != entry["sha256"]:
                yield stage, name, _DIFFERS


def notebook_digest(stage: Stage) -> str:
    """sha256 over the notebook's cell sources, blind to outputs and ids; empty where it is not beside us."""
    if not stage.notebook.exists():
        return ""
    cells = files.read_json(stage.notebook)["cells"]
    return hashlib.sha256("\0".join("".join(cell["source"]) for cell in cells).encode()).hexdigest()


class SeriesState(BaseModel):
    """How a run stands, read by whoever brings it home or resumes it.

    `running` on file means that the process died; `continue`, that the session ended before the work did.
    """

    state: Literal["running", "done", "continue", "failed"]
    stage: str = ""  # the one that failed or is to be resumed
    kind: str = ""  # the failure's type
    sentence: str = ""
    steps: int = 0  # or answers, saved in that stage: two sessions in a row with the same number made no progress


def write_state(run_dir: Path, state: SeriesState) -> None:
    """Nothing where there is no run directory."""
    if run_dir.is_dir():
        files.write_json(run_dir / STATE, state.model_dump(mode="json"))


def read_state(run_dir: Path) -> SeriesState | None:
    """The state on file; None where there is none that can be read."""
    try:
        return SeriesState.model_validate(files.read_json(run_dir / STATE))
    except (OSError, ValueError):
        return None
