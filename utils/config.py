"""From a profile and overrides to a validated configuration, and the sentence that a wrong value gets.

One YAML file below notebooks/profiles is one kind of run; `--set a.b=value` and a notebook's `OVERRIDES` change single
keys.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from utils.errors import ConfigError
from utils.files import is_there
from utils.project import PROFILES
from utils.schema import Config


def profile_names() -> list[str]:
    """The profiles that exist."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """`["train.max_steps=10"]` to `{"train.max_steps": 10}`; values are read as YAML.

    Raises ConfigError for anything that is not KEY=VALUE.
    """
    overrides = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"{assignment!r} is not KEY=VALUE; write for example --set train.max_steps=10.")
        try:
            overrides[key.strip()] = parse_yaml(value)
        except (yaml.YAMLError, ValueError):  # ValueError: an impossible date, 2024-99-99
            overrides[key.strip()] = value
    return overrides


def parse_yaml(text: str | bytes) -> Any:
    """The value that `text` holds; raises YAMLError or ValueError for whatever is no YAML, nesting without end included."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise
    except Exception as error:
        # PyYAML lets through what it stumbles over: IndexError for !!int '', KeyError for !!bool x.
        raise ValueError(type(error).__name__) from None


def load_config(profile: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The profile's YAML with `overrides` (dotted keys) applied, validated.

    Raises ConfigError, whose sentence names key, value and what is allowed.
    """
    names = profile_names()
    if profile not in names:
        raise ConfigError(f"There is no profile {profile!r}; there are {', '.join(names)}.")
    values = _read_yaml(PROFILES / f"{profile}.yaml", "take it back from git") | {"profile": profile}
    return _validate(_apply(values, overrides), f"profile {profile}")


def read_config(file: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """A run's config.yaml with `overrides` applied, validated together; raises ConfigError as `load_config` does."""
    values = _read_yaml(file, "bring it back, or begin anew with --fresh")
    if overrides and _is_primary_automatic(values):
        values["evaluate"]["primary"] = "auto"  # other data can carry another metric
    return _validate(_apply(values, overrides), str(file))


def edit_config(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`config` with `overrides` applied, validated together."""
    return _validate(_apply(config.model_dump(mode="json"), overrides), f"profile {config.profile}")


def differing_settings(config: Config) -> dict[str, Any]:
    """{dotted key: value} of what is not as the profile on file has it, by overrides or because the profile was changed."""
    try:
        profile = flatten(load_config(config.profile).model_dump(mode="json"))
    except ConfigError:
        return {}  # the profile is gone, and the run has all of its settings itself
    own = flatten(config.model_dump(mode="json", exclude={"prompt": {"format"}}))  # which 00 found, and nobody gave
    return {key: value for key, value in own.items() if profile.get(key) != value}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested settings."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _read_yaml(file: Path, remedy: str) -> dict[str, Any]:
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); {remedy}.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, or no UTF-8
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise ConfigError(f"{file.name} is not YAML{line}; mend it or {remedy}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file.name} holds no settings; expected sections such as model: and train:.")
    return values


def _is_primary_automatic(values: Mapping[str, Any]) -> bool:
    """Whether the primary metric on file is the one that `auto` picks for what is on file."""
    try:
        automatic = {**values, "evaluate": {**values["evaluate"], "primary": "auto"}}
        return Config.model_validate(automatic).evaluate.primary == values["evaluate"]["primary"]
    except (KeyError, TypeError, ValidationError):
        return False


def _apply(values: dict[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    for key, value in require_mapping(overrides).items():
        if key == "profile":
            raise ConfigError("profile is no setting of a run; choose it by --profile or PROFILE.")
        _assign(values, str(key), value)
    _measure_own_rows_by_loss(values, overrides or {})
    return values


def require_mapping(overrides: Any) -> Mapping[str, Any]:
    """`overrides`, {} for None; raises ConfigError for anything else that is no mapping."""
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(
            f"OVERRIDES is {_quote(overrides)}, not a mapping such as {{'train.max_steps': 10}}; "
            "with papermill pass it by -y 'OVERRIDES: {train.max_steps: 10}'."
        )
    return overrides or {}


def _validate(values: dict[str, Any], source: str) -> Config:
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None
    for key, value in _texts(config.model_dump()):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(
                f"{key} is {_quote(value)}, which no file can hold: take out the null byte or the half of a character."
            )
    return config


def _measure_own_rows_by_loss(values: dict, overrides: Mapping[str, Any]) -> None:
    """The profile's benchmark says little about a reader's own rows: with `data.path` and no benchmark of theirs, `primary: auto`
    is the held-out loss, and the profile's benchmark stays beside it."""
    evaluate = values.get("evaluate") or {}
    named = any(
        overrides.get(key) for key in ("evaluate.benchmark", "evaluate.benchmark.name", "evaluate.benchmark.path")
    )
    own_rows = overrides.get("data.path") and not named
    if own_rows and isinstance(evaluate, Mapping) and evaluate.get("primary", "auto") == "auto":
        values["evaluate"] = {**evaluate, "primary": "nll"}


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text and path below `values`."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, key)
    elif isinstance(values, (str, Path)):
        yield key, str(values)


_PATHS = (".path", ".accelerate_config")  # settings that are paths and nothing else


def absolute_overrides(overrides: Mapping[str, Any] | None, base: Path | None = None) -> dict[str, Any]:
    """The overrides with local paths that exist below `base` (the current directory) made absolute."""
    base = base or Path.cwd()
    result = {}
    for key, value in require_mapping(overrides).items():
        if isinstance(value, str) and (key.endswith(_PATHS) or key in ("model.name", "export.base")):
            candidate = base / expand_home(value, key)
            value = str(candidate.resolve()) if key.endswith(_PATHS) or is_there(candidate) else value
        elif isinstance(value, list):  # evaluate.more_benchmarks
            value = [
                item | {"path": str((base / expand_home(item["path"], f"{key}.path")).resolve())}
                if isinstance(item, dict) and isinstance(item.get("path"), str)
                else item
                for item in value
            ]
        result[key] = value
    return result


def expand_home(path: str | Path, what: str) -> Path:
    """`path` with ~ replaced; raises ConfigError for a user whom this machine does not know, and for what no path can be."""
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("a null byte")
        return Path(path).expanduser()
    except ValueError:
        raise ConfigError(f"{what} is {_quote(str(path))}, which no file system takes; name another path.") from None
    except RuntimeError:
        raise ConfigError(
            f"{what} is {_quote(str(path))}, but there is no such user here; write the path out."
        ) from None


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
    problems = error.errors()
    first = problems[0]
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
        text = f"{dotted} is {_quote(first['input'])}: {_plain(first['msg'])} ({source})."
    return text if len(problems) == 1 else f"{text} ({len(problems) - 1} more problem(s) of this kind.)"


def _quote(value: Any) -> str:
    """A value as Python writes it, a few hundred characters of it at most: YAML's references can stand for gigabytes."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 200, 200
    return short.repr(value)


def _plain(message: str) -> str:
    return message[0].lower() + message[1:]


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        if part.isdigit():  # an entry of a list, whose type the step before has already found
            continue
        annotation = model.model_fields[part].annotation
        annotation = next(iter(get_args(annotation)), annotation) if get_origin(annotation) is list else annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [name for name in model.model_fields if name != "profile"]
