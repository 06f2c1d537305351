"""Every setting of a run: its name, its type, its range. Names are those of the libraries that they reach."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

EMBEDDED = "embedded"
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Projection = Literal["all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GgufType = Literal["f16", "q8_0", "q4_k_m"]
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
    columns: dict[Literal["Question", "Complex_CoT", "Response", "group", "messages", "conversations"], str] = {}
    reasoning: Literal["required", "optional"] = "required"  # optional: rows without any train an empty think block
    train_rows: Positive | None = None
    eval_rows: Positive = 200
    validation_rows: Positive | None = None  # looked at while training: their loss is a curve beside the training loss
    duplicate_threshold: Annotated[float, Field(gt=0, le=1)] = 0.5  # two questions are one; 1: exact duplicates only
    shuffle_answers: bool = False  # a control: every training question gets another row's answer
    seed: NotNegative = 3407


class BenchmarkSection(Section):
    """Multiple-choice items: a Hub id with a revision or a local file in `path`; neither means none."""

    name: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str = "test"
    path: Path | None = None
    rows: Positive = 300

    @property
    def wanted(self) -> bool:
        """Whether any benchmark was named."""
        return bool(self.name or self.path)


class PromptFormat(Section):
    """The text around a question and its answer, as 00 finds it by the tokenizer."""

    style: Literal["native", "chat", "tutorial"]
    before: str  # the question
    after: str  # the question; ends in an opened think block
    lead: str  # before the reasoning: the newline that `after` may lack
    close: str  # between reasoning and response
    end: str  # the token that ends an answer: the trainer adds it, generation stops at it


class PromptSection(Section):
    """`native` is DeepSeek's format, `chat` the model's own template, `tutorial` the published one; `auto` picks of the first two."""

    style: Literal["auto", "native", "chat", "tutorial"] = "auto"
    format: PromptFormat | None = None  # found out by 00


class LoraSection(Section):
    """Arguments of peft.LoraConfig."""

    r: Positive = 16
    lora_alpha: Positive = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[Projection], Field(min_length=1)] = list(get_args(Projection)[1:])
    use_rslora: bool = False  # scales by lora_alpha / sqrt(r) and not by lora_alpha / r

    @field_validator("target_modules", mode="before")
    @classmethod
    def _list_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value  # all-linear, as peft writes it


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
    step_plan: Literal["auto", "given"] = "given"  # auto: micro-batch, accumulation, recomputed layers found by trials
    save_steps: Positive = 50
    eval_steps: Positive = 50  # updates between two looks at the validation rows
    keep: Literal["last", "best"] = "last"  # best: the weights with the lowest validation loss
    early_stopping_patience: Positive | None = None  # looks without a lower validation loss before training ends
    logging_steps: Positive = 1
    seed: NotNegative = 3407

    @property
    def rows_per_update(self) -> int:
        """Rows, or packs, that go into one update, however many processes share them."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class GenerateSection(Section):
    """Arguments of model.generate, the same for both models."""

    max_new_tokens: Positive = 1024
    batch_size: Positive | Literal["auto"] = "auto"  # auto: as many at once as free memory allows
    do_sample: bool = True
    temperature: Annotated[float, Field(gt=0, le=2)] = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    seed: NotNegative = 3407


class EvaluateSection(Section):
    """What is measured, fixed before any answer exists."""

    primary: Literal["auto", "accuracy", "multiple_choice", "nll"] = "auto"
    questions: Positive | None = None  # held-out questions answered in words; None: all of them
    benchmark: BenchmarkSection = BenchmarkSection()
    more_benchmarks: list[BenchmarkSection] = []
    letter_logprobs: bool = False  # also the letters' log-probabilities over the whole first benchmark
    resamples: Annotated[int, Field(ge=1000, le=100_000)] = 10_000
    seed: NotNegative = 3407

    @model_validator(mode="after")
    def _names_every_benchmark(self) -> "EvaluateSection":
        if not all(section.wanted for section in self.more_benchmarks):
            raise ValueError("each of more_benchmarks needs a name (a Hub id) or a path")
        return self

    @property
    def benchmarks(self) -> list[BenchmarkSection]:
        """The benchmarks that were named, the primary one first."""
        return [section for section in (self.benchmark, *self.more_benchmarks) if section.wanted]


class ExportSection(Section):
    """What 05 writes and how thoroughly it compares."""

    merged: bool | Literal["auto"] = "auto"  # auto: not on Kaggle and Colab
    base: str | None = None  # the 16-bit model to merge into, an id or a folder; None: the trained one, or its sibling
    base_revision: str | None = None
    gguf: list[GgufType] | Literal["auto"] = "auto"  # where llama.cpp is; []: none; auto: all, on Kaggle q4_k_m
    install_llama_cpp: bool | Literal["auto"] = "auto"  # fetch unsloth's build; auto: on Kaggle and Colab
    push_to_hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None  # USER/NAME: private repositories
    prompts: Positive = 8  # held-out prompts on which every export is compared with the model in memory


class TrackingSection(Section):
    """wandb: `auto` is online when a key is found and offline otherwise."""

    mode: Literal["auto", "offline", "disabled"] = "auto"
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,127}$")] = "deepseek-r1-medical-lora"


class HardwareSection(Section):
    """What the run needs, and how it uses what it finds."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    processes: Positive | Literal["auto"] = "auto"  # that answer questions and train; auto: one for each GPU
    accelerate_config: Path | None = None  # of `accelerate config`: trains on several machines
    min_gpu_memory_gib: Annotated[float, Field(ge=0)] = 0.0
    min_disk_gib: Annotated[float, Field(ge=0)] = 1.0  # for the run directory
    min_cache_gib: Annotated[float, Field(ge=0)] = 0.0  # for what is downloaded from the Hub
    max_hours: Annotated[float, Field(gt=0)] | None = None  # an older session ends itself; the next one resumes
    emulate_t4: bool = False  # on a larger GPU: a T4's attention, choice of 4-bit products, 14 GiB (benchmarks use it)
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
    # In YAML a section without keys is None.
    evaluate: Annotated[EvaluateSection, BeforeValidator(lambda given: given or {})] = EvaluateSection()
    export: ExportSection = ExportSection()
    tracking: TrackingSection = TrackingSection()
    hardware: HardwareSection = HardwareSection()

    @model_validator(mode="after")
    def _register_primary(self) -> "Config":
        """Replace `primary: auto` by what the data can carry, so that the run directory names it before any score."""
        if self.evaluate.primary == "auto":
            carried = "multiple_choice" if self.evaluate.benchmark.wanted else "nll"
            primary = "accuracy" if self.embedded_data else carried
            self.__dict__["evaluate"] = self.evaluate.model_copy(update={"primary": primary})  # frozen from here on
        return self

    @model_validator(mode="after")
    def _can_carry_primary(self) -> "Config":
        """A primary metric that these data can never carry is refused now, not after the training."""
        primary, benchmark = self.evaluate.primary, self.evaluate.benchmark
        if primary == "multiple_choice" and not benchmark.wanted:
            raise ValueError("evaluate.primary is multiple_choice, but no evaluate.benchmark is named")
        if self.evaluate.letter_logprobs and not benchmark.wanted:
            raise ValueError("evaluate.letter_logprobs is on, but no evaluate.benchmark is named")
        if primary == "accuracy" and not self.embedded_data and self.data.path is None:
            raise ValueError("evaluate.primary is accuracy, but a Hub data set has no answers that a rule can check")
        return self

    @model_validator(mode="after")
    def _can_validate(self) -> "Config":
        """What is decided by the validation loss needs validation rows, and checkpoints where it is measured."""
        train = self.train
        if self.data.validation_rows is None and (train.keep == "best" or train.early_stopping_patience):
            chosen = "train.keep is best" if train.keep == "best" else "train.early_stopping_patience is set"
            raise ValueError(f"{chosen}, but there are no validation rows to decide by; set data.validation_rows")
        if train.keep == "best" and train.save_steps % train.eval_steps:
            steps = f"train.save_steps={train.save_steps} is no multiple of train.eval_steps={train.eval_steps}"
            raise ValueError(f"train.keep is best, but {steps}; change either")
        return self

    @property
    def embedded_data(self) -> bool:
        """Whether the rows are the synthetic ones of `data.synthetic`."""
        return self.data.path is None and self.data.name == EMBEDDED

    def sections(self, *names: str, exclude: dict[str, set[str]] | None = None) -> dict[str, Any]:
        """The named sections (or `section.key`) as plain JSON values, without the keys of `exclude`."""
        dumped, picked = self.model_dump(mode="json", exclude=exclude), {}
        for name in names:
            section, _, key = name.partition(".")
            picked[name] = dumped[section][key] if key else dumped[section]
        return picked

    def to_yaml(self) -> str:
        """The whole configuration as YAML, in the order of the sections, a section to a line where it fits."""
        values = self.model_dump(mode="json")
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
