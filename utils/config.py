"""Every setting of a run: its type, its range, and the sentence that a wrong value gets.

One YAML file below notebooks/profiles is one kind of run; `--set a.b=value` and a notebook's `OVERRIDES` change single
keys. Field names are those of the libraries they reach (LoraConfig, SFTConfig, generate), so that a reader can look
them up there.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from utils.errors import ConfigError
from utils.project import PROFILES

EMBEDDED = "embedded"
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd"
]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which base model: a Hub id with a revision, a local folder, or `embedded`."""

    name: str
    revision: str | None = None
    load_in_4bit: bool = True
    max_seq_length: Positive = 2048


class DataSection(Section):
    """Which rows: a Hub id with a revision, or a local file in `path` (which wins), and how many for what."""

    name: str = EMBEDDED
    subset: str | None = None
    revision: str | None = None
    path: Path | None = None
    train_rows: Positive | None = None
    eval_rows: Positive = 200
    shuffle: bool = True
    seed: NotNegative = 3407


class BenchmarkSection(Section):
    """Multiple-choice items: a Hub id with a revision or a local JSONL in `path`; neither means none."""

    name: str | None = None
    revision: str | None = None
    split: str = "test"
    path: Path | None = None
    rows: Positive = 300

    @property
    def wanted(self) -> bool:
        """Whether any benchmark was named."""
        return bool(self.name or self.path)


class PromptSection(Section):
    """`native` is DeepSeek's chat format, `tutorial` the published instruction template."""

    style: Literal["native", "tutorial"] = "native"


class LoraSection(Section):
    """Arguments of peft.LoraConfig."""

    r: Positive = 16
    lora_alpha: Positive = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[Projection], Field(min_length=1)] = list(get_args(Projection))


class TrainSection(Section):
    """Arguments of trl.SFTConfig, and what the loss looks at."""

    loss_on: Literal["completion", "all"] = "completion"
    per_device_train_batch_size: Positive = 2
    gradient_accumulation_steps: Positive = 4
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: NotNegative | None = None  # None: as many as the epochs take; 0: a null run that learns nothing
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: NotNegative = 5
    optim: Optimizer = "adamw_8bit"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    packing: bool = False
    gradient_checkpointing: bool = True
    save_steps: Positive = 50
    logging_steps: Positive = 1
    seed: NotNegative = 3407


class GenerateSection(Section):
    """Arguments of model.generate, the same in both arms."""

    max_new_tokens: Positive = 1024
    batch_size: Positive = 16
    do_sample: bool = True
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: NotNegative = 3407


class EvaluateSection(Section):
    """What is measured, fixed before any answer exists."""

    primary: Literal["auto", "accuracy", "multiple_choice", "nll"] = "auto"
    questions: Positive | None = None  # held-out questions answered in words; None: all of them
    benchmark: BenchmarkSection = BenchmarkSection()
    resamples: Annotated[int, Field(ge=1000, le=100_000)] = 10_000
    seed: NotNegative = 3407


class ExportSection(Section):
    """What 05 writes and how thoroughly it compares."""

    merged: bool = True
    prompts: Positive = 8  # held-out prompts on which adapter and merged model are compared


class TrackingSection(Section):
    """wandb: `auto` is online when a key is found and offline otherwise."""

    mode: Literal["auto", "offline", "disabled"] = "auto"
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,127}$")] = "deepseek-r1-medical-lora"


class HardwareSection(Section):
    """What the run needs, and how it uses what it finds."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    min_gpu_memory_gib: Annotated[float, Field(ge=0)] = 0.0
    min_disk_gib: Annotated[float, Field(ge=0)] = 1.0  # for the run directory
    min_cache_gib: Annotated[float, Field(ge=0)] = 0.0  # for what is downloaded from the Hub
    emulate_t4: bool = False  # on a larger GPU: no flash or cuDNN attention, at most 14 GiB (benchmarks use it)
    pins: Literal["enforce", "report"] = "enforce"


class Config(Section):
    """One run's settings, whole."""

    profile: str
    model: ModelSection
    data: DataSection = DataSection()
    prompt: PromptSection = PromptSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    generate: GenerateSection = GenerateSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()
    tracking: TrackingSection = TrackingSection()
    hardware: HardwareSection = HardwareSection()

    @model_validator(mode="before")
    @classmethod
    def _register_primary(cls, values: Any) -> Any:
        """Replace `primary: auto` by what the data can carry, so that the run directory names it before any score."""
        if not isinstance(values, Mapping):
            return values
        evaluate, data = values.get("evaluate") or {}, values.get("data") or {}
        if not isinstance(evaluate, Mapping):
            return values  # validation says it better
        evaluate = dict(evaluate)
        if evaluate.get("primary", "auto") == "auto" and isinstance(data, Mapping):
            benchmark = evaluate.get("benchmark") or {}
            embedded = data.get("name", EMBEDDED) == EMBEDDED and not data.get("path")
            if embedded:
                evaluate["primary"] = "accuracy"
            elif isinstance(benchmark, Mapping) and (benchmark.get("name") or benchmark.get("path")):
                evaluate["primary"] = "multiple_choice"
            else:
                evaluate["primary"] = "nll"
        return {**values, "evaluate": evaluate}

    @model_validator(mode="after")
    def _can_carry_primary(self) -> Config:
        """A primary metric that these data can never carry is refused now, not after the training."""
        primary, benchmark = self.evaluate.primary, self.evaluate.benchmark
        if primary == "multiple_choice" and not benchmark.wanted:
            raise ValueError("evaluate.primary is multiple_choice, but no evaluate.benchmark is named")
        if primary == "accuracy" and not self.embedded_data and self.data.path is None:
            raise ValueError("evaluate.primary is accuracy, but a Hub data set has no answers that a rule can check")
        return self

    @property
    def embedded_data(self) -> bool:
        """Whether the rows are the synthetic ones of `demo_data`."""
        return self.data.path is None and self.data.name == EMBEDDED

    def sections(self, *names: str) -> dict[str, Any]:
        """The named sections (or `section.key`) as plain JSON values."""
        dumped = self.model_dump(mode="json")
        picked = {}
        for name in names:
            section, _, key = name.partition(".")
            picked[name] = dumped[section][key] if key else dumped[section]
        return picked

    def to_yaml(self) -> str:
        """The whole configuration as YAML, in the order of the sections, a section to a line where it fits."""
        values = self.model_dump(mode="json")
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


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
            overrides[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # ValueError: an impossible date, 2024-99-99
            overrides[key.strip()] = value
    return overrides


def load_config(profile: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The profile's YAML with `overrides` (dotted keys) applied, validated.

    Raises ConfigError, whose sentence names key, value and what is allowed.
    """
    names = profile_names()
    if profile not in names:
        raise ConfigError(f"There is no profile {profile!r}; there are {', '.join(names)}.")
    source = PROFILES / f"{profile}.yaml"
    try:
        values = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, or no UTF-8
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise ConfigError(f"{source.name} is not YAML{line}; mend it or take it back from git.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source.name} holds no settings; expected sections such as model: and train:.")
    values["profile"] = profile
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(
            f"OVERRIDES is {overrides!r}, not a mapping such as {{'train.max_steps': 10}}; "
            "with papermill pass it by -y 'OVERRIDES: {train.max_steps: 10}'."
        )
    for key, value in (overrides or {}).items():
        if key == "profile":
            raise ConfigError("profile is no setting of a run; choose it by --profile or PROFILE.")
        _assign(values, str(key), value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, profile)) from None


def absolute_overrides(overrides: Mapping[str, Any], base: Path | None = None) -> dict[str, Any]:
    """The overrides with local paths that exist below `base` (the current directory) made absolute."""
    base = base or Path.cwd()
    result = {}
    for key, value in overrides.items():
        if isinstance(value, str) and (key.endswith(".path") or key == "model.name"):
            candidate = base / Path(value).expanduser()
            value = str(candidate.resolve()) if candidate.exists() or key.endswith(".path") else value
        result[key] = value
    return result


def _assign(values: dict, dotted: str, value: Any) -> None:
    """Set values["a"]["b"] for "a.b"; a section that does not exist is left to validation."""
    *sections, key = dotted.split(".")
    place = values
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise ConfigError(f"{dotted} goes through {section}, which is a value and not a section.")
    place[key] = value


def _explain(error: ValidationError, profile: str) -> str:
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
        text = f"{dotted} is missing from the profile {profile}; add it."
    elif not dotted:
        text = f"{first['msg'].removeprefix('Value error, ')} (profile {profile})."
    else:
        text = f"{dotted} is {first['input']!r}: {_plain(first['msg'])} (profile {profile})."
    return text if len(problems) == 1 else f"{text} ({len(problems) - 1} more problem(s) of this kind.)"


def _plain(message: str) -> str:
    return message[0].lower() + message[1:]


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [name for name in model.model_fields if name != "profile"]
