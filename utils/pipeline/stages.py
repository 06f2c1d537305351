"""The six stages as one table: what each needs, reads and writes, and which settings change its result."""

from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.project import NOTEBOOKS


@dataclass(frozen=True)
class Stage:
    """One notebook. Paths are below the run directory; a path that names a folder stands for all its files."""

    name: str
    title: str
    needs: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: tuple[str, ...]
    optional: tuple[str, ...] = ()  # outputs that some configurations leave out

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def notebook(self) -> Path:
        return NOTEBOOKS / f"{self.name}.ipynb"


_MODEL = ("model", "prompt", "hardware.dtype", "hardware.backend", "hardware.device")
_WHAT_IS_ASKED = ("data/eval.parquet", "data/benchmark.jsonl", "data/anecdote.json", "data/probe_items.jsonl")
_MEASURED = tuple(
    f"evaluate.{key}" for key in ("primary", "questions", "benchmark", "letter_logprobs", "more_benchmarks", "seed")
)
STAGES = (
    Stage(
        "00_setup", "Setup and frozen split", needs=(), inputs=(),
        outputs=("environment.json", *_WHAT_IS_ASKED[:3],
                 *(f"data/{name}" for name in ("train.parquet", "split.json", "registration.json"))),
        settings=("data", "generate", "prompt", "model.name", "model.revision", *_MEASURED),
        optional=("data/probe_items.jsonl", "data/validation.parquet"),
    ),
    Stage(
        "01_baseline_inference", "Baseline answers", needs=("00_setup",), inputs=_WHAT_IS_ASKED,
        outputs=("baseline/answers.jsonl", "baseline/forced.jsonl", "baseline/nll.parquet"),
        settings=(*_MODEL, "generate", "evaluate.questions", "evaluate.letter_logprobs"),
        optional=("baseline/probe.jsonl",),
    ),
    Stage(
        "02_dataset_formatting", "From row to tokens", needs=("00_setup",), inputs=("data/train.parquet", "data/validation.parquet"),
        outputs=("data/formatted", "data/lengths.png"),
        settings=("model", "prompt", "train.loss_on"),
    ),
    Stage(
        "03_lora_training", "LoRA training", needs=("02_dataset_formatting",), inputs=("data/formatted",),
        outputs=("training/adapter", "training/log.csv", "training/loss.png", "training/step_plan.json",
                 "training/summary.json"),
        settings=(*_MODEL, "lora", "train"),
    ),
    Stage(
        "04_comparison", "Comparison and verdict", needs=("01_baseline_inference", "03_lora_training"),
        # The adapter last: all before it is read when scores are recomputed.
        inputs=(*_WHAT_IS_ASKED, "data/registration.json", "data/split.json", "baseline", "training/adapter"),
        outputs=("tuned/answers.jsonl", "tuned/forced.jsonl", "tuned/nll.parquet", "comparison"),
        settings=(*_MODEL, "generate", "evaluate"),
        optional=("tuned/probe.jsonl",),
    ),
    Stage(
        "05_export", "Export, loaded back", needs=("04_comparison",),
        inputs=("training/adapter", "comparison/metrics.json"),
        outputs=("export/adapter", "export/README.md", "export/reference.safetensors", "export/verify.json"),
        settings=(*_MODEL, "export"),
        optional=("export/merged", "export/gguf"),
    ),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}


def ancestors(stage: Stage) -> list[Stage]:
    """Every stage that `stage` rests on, directly or not, in the order of the series."""
    needed = {name for earlier in stage.needs for name in (earlier, *(s.name for s in ancestors(BY_NAME[earlier])))}
    return [other for other in STAGES if other.name in needed]


def find_stage(number_or_name: str) -> Stage:
    """The stage called `3`, `03` or `03_lora_training`; raises UserError otherwise."""
    for stage in STAGES:
        if number_or_name in (stage.number, stage.name, str(int(stage.number))):
            return stage
    raise UserError(f"There is no stage {number_or_name!r}; there are {STAGES[0].number} to {STAGES[-1].number}.")
