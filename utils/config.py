"""From a profile and overrides to a validated configuration, and the sentence that a wrong value gets.

One YAML file below notebooks/profiles is one kind of run; `--set a.b=value` and `OVERRIDES` change single keys.
"""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from utils.errors import ConfigError
from utils.files import is_there
from utils.hardware import resolve_hardware
from utils.project import PROFILES
from utils.schema import Config

_PATHS = ("path", ".accelerate_config")  # settings that are paths and nothing else
_BELONGS_TO = {  # a name, and what says nothing about another one
    "model.name": ("model.revision", "export.base_revision"),
    "export.base": ("export.base_revision",),
    "data.name": ("data.revision", "data.subset"),
    "data.path": ("data.revision", "data.subset"),
    "evaluate.benchmark.name": ("evaluate.benchmark.revision", "evaluate.benchmark.subset"),
    "evaluate.benchmark.path": ("evaluate.benchmark.revision", "evaluate.benchmark.subset"),
}


def profile_names() -> list[str]:
    """The profiles that exist."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`["train.max_steps=10"]` to `{"train.max_steps": 10}`, values read as YAML; ConfigError for what is not KEY=VALUE."""
    overrides = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"{assignment!r} is not KEY=VALUE; write for example --set train.max_steps=10.")
        with suppress(Exception):  # not YAMLError alone: ValueError for 2024-99-99, IndexError for !!int ''
            value = yaml.safe_load(value)
        overrides[key.strip()] = value
    return overrides


def load_config(profile: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The profile's YAML with `overrides` (dotted keys) applied; raises ConfigError with key, value and what is allowed.

    Where the run's device is a CPU, the profile's section `on_cpu` comes between the two: the same run, in another size.
    """
    names = profile_names()
    if profile not in names:
        raise ConfigError(f"There is no profile {profile!r}; there are {', '.join(names)}.")
    values = _read_yaml(PROFILES / f"{profile}.yaml", "take it back from git") | {"profile": profile}
    on_cpu, source = values.pop("on_cpu", None), f"profile {profile}"
    config = _validate(_apply(values, overrides), source)
    if on_cpu and resolve_hardware(config.hardware)["device"] == "cpu":
        return _validate(_apply(values, dotted_overrides(on_cpu) | dotted_overrides(overrides)), source)
    return config


def read_config(file: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """A run's config.yaml with `overrides` applied, validated together; raises ConfigError as `load_config` does."""
    values = _read_yaml(file, "bring it back, or begin anew with --fresh")
    with suppress(KeyError, TypeError, ValidationError):
        automatic = values | {"evaluate": {**values["evaluate"], "primary": "auto"}}
        if overrides and Config.model_validate(automatic).evaluate.primary == values["evaluate"]["primary"]:
            values = automatic  # it was chosen by what is on file, and other data can carry another metric
    return _validate(_apply(values, overrides), str(file))


def found_by_setup(stored: Config, config: Config) -> dict[str, Any]:
    """Overrides: what 00 found out for the `stored` settings (commits, prompt.format) where `config` leaves it open."""
    before, now = stored.model_dump(mode="json"), config.model_dump(mode="json")
    sections = {"model": "revision", "data": "revision", "prompt": "format"}
    found = {f"{name}.{key}": before[name][key] for name, key in sections.items() if now[name][key] is None}
    before, now = before["evaluate"], now["evaluate"]
    if now["benchmark"]["revision"] is None:
        found["evaluate.benchmark.revision"] = before["benchmark"]["revision"]
    if len(now["more_benchmarks"]) == len(before["more_benchmarks"]):
        found["evaluate.more_benchmarks"] = [
            section | {"revision": section["revision"] or pinned["revision"]}
            for section, pinned in zip(now["more_benchmarks"], before["more_benchmarks"], strict=True)
        ]
    return {key: value for key, value in found.items() if value}


def differing_settings(config: Config) -> dict[str, Any]:
    """{dotted key: value} of what is not as the profile on file has it, but for what the run found out itself."""
    try:
        values = _read_yaml(PROFILES / f"{config.profile}.yaml", "") | {"profile": config.profile}
        on_cpu = flatten(values.pop("on_cpu", {}))  # a run may have begun on another machine
        profile = _validate(values, "")
        by_export = {"export.base_revision": profile.export.base_revision or config.export.base_revision}
        found = _validate(_apply(values, found_by_setup(config, profile) | by_export), "")
    except ConfigError:
        return {}  # the profile is gone, and the run has all of its settings itself
    own, on_file = (flatten(one.model_dump(mode="json")) for one in (config, found))
    sized = {key for key, value in on_cpu.items() if own[key] == value}
    return {key: value for key, value in own.items() if on_file.get(key) != value and key not in sized}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested settings; an empty section is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def _read_yaml(file: Path, remedy: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); {remedy}.") from None
    except Exception as error:  # YAMLError, ValueError for an impossible date, and what PyYAML stumbles over
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise ConfigError(f"{file.name} is not YAML{line}; mend it or {remedy}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file.name} holds no settings; expected sections such as model: and train:.")
    return values


def _apply(values: dict[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    overrides, before = dotted_overrides(overrides), flatten(values)
    # The same name given again keeps its commit and subset.
    renamed = [key for key in _BELONGS_TO if key in overrides and str(overrides[key]) != str(before.get(key))]
    outlived = {pin: None for key in renamed for pin in _BELONGS_TO[key]}
    for key, value in (outlived | overrides).items():
        if key == "profile":
            raise ConfigError("profile is no setting of a run; choose it by --profile or PROFILE.")
        _assign(values, key, value)
    # A profile's benchmark says little about a reader's own rows: `primary: auto` is the held-out loss there.
    evaluate, benchmark = values.get("evaluate") or {}, ("evaluate.benchmark.name", "evaluate.benchmark.path")
    own_rows = overrides.get("data.path") and not any(map(overrides.get, benchmark))
    if own_rows and isinstance(evaluate, Mapping) and evaluate.get("primary", "auto") == "auto":
        values["evaluate"] = {**evaluate, "primary": "nll"}
    return values


def dotted_overrides(overrides: Any) -> dict[str, Any]:
    """`overrides` with dotted keys alone, {} for None; raises ConfigError for anything else that is no mapping."""
    if overrides is not None and not isinstance(overrides, Mapping):
        papermill = "with papermill pass it by -y 'OVERRIDES: {train.max_steps: 10}'"
        raise ConfigError(f"OVERRIDES is {overrides!r}, not a mapping such as {{'train.max_steps': 10}}; {papermill}.")
    return flatten(overrides or {})


def _validate(values: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def absolute_overrides(overrides: Mapping[str, Any] | None, base: Path | None = None) -> dict[str, Any]:
    """The overrides, dotted, with local paths that exist below `base` (the current directory) made absolute."""
    base = base or Path.cwd()
    result = {}
    for key, value in dotted_overrides(overrides).items():
        if isinstance(value, str) and (key.endswith(_PATHS) or key in ("model.name", "export.base")):
            candidate = base / expand_home(value, key)
            value = str(candidate.resolve()) if key.endswith(_PATHS) or is_there(candidate) else value
        elif isinstance(value, list):  # evaluate.more_benchmarks
            value = [absolute_overrides(item, base) if isinstance(item, Mapping) else item for item in value]
        result[key] = value
    return result


def expand_home(path: str | Path, what: str) -> Path:
    """`path` with ~ replaced; raises ConfigError for a user whom this machine does not know."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{what} is {str(path)!r}, but there is no such user here; write the path out.") from None


def _assign(values: dict, dotted: str, value: Any) -> None:
    """Set values["a"]["b"] for "a.b"; a section that does not exist is left to validation."""
    *sections, key = dotted.split(".")
    place = values
    for section in sections:
        inner = {} if place.get(section) is None else place[section]
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted} goes through {section}, which is a value and not a section.")
        place[section] = place = dict(inner)  # a copy: what OVERRIDES holds is the reader's
    place[key] = value


def _explain(error: ValidationError, source: str) -> str:
    """One sentence for the first problem, and how many more there are."""
    first, *others = error.errors()
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {'.'.join([*path[:-1], close[0]])}?" if close else f"known are {', '.join(known)}."
        text = f"{dotted} is not a setting; {hint}"
    elif first["type"] == "missing":
        text = f"{dotted} is missing from the {source}; add it."
    elif not dotted:
        text = f"{first['msg'].removeprefix('Value error, ')} ({source})."
    else:
        text = f"{dotted} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]} ({source})."
    return f"{text} ({len(others)} more problem(s) of this kind.)" if others else text


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        if not part.isdigit():  # an entry of a list, whose type the step before has already found
            annotation = model.model_fields[part].annotation
            kinds = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
            model = next(kind for kind in kinds if issubclass(kind, BaseModel))
    return [name for name in model.model_fields if name != "profile"]
