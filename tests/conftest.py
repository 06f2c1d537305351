"""Fixtures that several files share: the embedded model, a tiny model of random weights, and one run of the whole demo."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

from tests.loopback import HubServer, KaggleServer
from utils.project import ROOT, python_path

# The same examples on any day; `make faults` looks for others.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("same")


def pytest_configure() -> None:
    """A shell that starts the tests in the background has every process below ignore SIGINT: what Ctrl-C does could not be tried."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long fixtures first: one process runs the demo, the others steal from the end, and nobody waits for it."""
    items.sort(
        key=lambda item: (not {"demo_run", "copied_run"} & {*item.fixturenames}, "small_run" not in item.fixturenames)
    )


@dataclass(frozen=True)
class DemoRun:
    """The one papermill run of the demo: its directory, how it ended, and how much processor time it took."""

    path: Path
    returncode: int
    output: str
    seconds: float


def run_command(*words: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """`python -m utils WORDS` in a process of its own, from the checkout unless told otherwise."""
    environment = {**os.environ, "PYTHONPATH": python_path(), "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "utils", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=900)


def children_seconds() -> float:
    """The processor time of all processes that this one started and has seen end: the same on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def import_file(path: Path):
    """The module in `path`, whose source `inspect` finds there."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session that all processes of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def embedded_model(shared_folder: Path) -> Path:
    """The embedded base model's folder, built on first use, by one process."""
    from utils.models.tiny import ensure_model

    with FileLock(shared_folder / "model.lock"):
        return ensure_model()


@pytest.fixture(scope="session")
def demo_run(shared_folder: Path, embedded_model: Path) -> DemoRun:
    """One run of all six notebooks by `python -m utils run --profile demo`, for all processes of pytest-xdist.

    Read it, never write to it.
    """
    told = shared_folder / "demo.json"
    with FileLock(shared_folder / "demo.lock"):
        if not told.exists():
            before = children_seconds()
            done = run_command("run", "--profile", "demo", "--run-dir", shared_folder / "demo")
            outcome = done.returncode, done.stdout + done.stderr, children_seconds() - before
            told.write_text(json.dumps(outcome), encoding="utf-8")
    return DemoRun(shared_folder / "demo", *json.loads(told.read_text(encoding="utf-8")))


@pytest.fixture
def copied_run(demo_run: DemoRun, tmp_path: Path) -> Path:
    """A copy of the demo run that a test may damage or continue."""
    return Path(shutil.copytree(demo_run.path, tmp_path / "demo"))


@pytest.fixture(scope="session")
def small_run(shared_folder: Path, embedded_model: Path) -> Path:
    """An undisturbed run of a small demo, one for all processes of pytest-xdist; read it, never write to it."""
    from tests.faults.series_process import SeriesProcess

    path, done = shared_folder / "undisturbed", shared_folder / "undisturbed.done"
    with FileLock(shared_folder / "undisturbed.lock"):
        if not done.exists():
            series = SeriesProcess(path)
            assert series.wait() == 0, series.output
            done.touch()
    return path


@pytest.fixture
def small_copy(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the small run that a test may damage or continue."""
    return Path(shutil.copytree(small_run, tmp_path / "demo"))


@pytest.fixture(scope="session")
def tiny_model():
    """(model, tokenizer): a two-layer Llama of random weights with DeepSeek's special tokens, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils.data import synthetic as demo_data
    from utils.models.tiny import train_tokenizer

    tokenizer = train_tokenizer((text for row in demo_data.base_rows(300) for text in row.values()), 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` saved as a model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for part in tiny_model:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def training_run(tiny_folder: Path, tmp_path: Path, request: pytest.FixtureRequest):
    """A function that makes a run directory ready for notebook 03: `training_run(name, **settings)`; few rows, tiny model."""
    import pandas as pd

    from utils.data import synthetic as demo_data
    from utils.data.prompts import format_row
    from utils.evaluation.loss import tokenize_row
    from utils.models.tokenizer import load_tokenizer
    from utils.pipeline.lock import release_lock
    from utils.pipeline.run_dir import open_run
    from utils.pipeline.stage import StageRun
    from utils.pipeline.stages import BY_NAME

    tokenizer = load_tokenizer(tiny_folder)

    def formatted(part: str, count: int, **changes: str) -> pd.DataFrame:
        pairs = [format_row(row | changes, "native") for row in demo_data.tuning_rows(part, count)]
        parts = [tokenize_row(tokenizer, *pair)["part"] for pair in pairs]
        counts = {"tokens": [len(part) for part in parts], "counted": [sum(p > 0 for p in part) for part in parts]}
        return pd.DataFrame(pairs, columns=["prompt", "completion"]).assign(**counts)

    rows = formatted("train", 64)

    def make(name: str = "run", **settings):
        few = {"model.name": str(tiny_folder), "train.max_steps": 12, "train.save_steps": 3, "tracking.mode": "disabled",
               "train.per_device_train_batch_size": 4, "train.warmup_steps": 2}  # fmt: skip
        few |= {key.replace("__", "."): value for key, value in settings.items()}
        opened = open_run("demo", tmp_path / name, few)
        run = StageRun(opened.path, opened.config, BY_NAME["03_lora_training"])
        run.save()
        request.addfinalizer(lambda: release_lock(run.path, run.stage.name))
        computed_on = {"device": "cpu", "backend": "transformers", "dtype": "float32"}
        run.write_record(run.stage, state="running", started="2026-11-21T00:00:00+00:00", computed_on=computed_on)
        run.file("data/formatted").mkdir(parents=True)
        rows.to_parquet(run.file("data/formatted/train.parquet"))
        if count := run.config.data.validation_rows:
            strange = formatted("validation", count, Complex_CoT="~ # ^ " * 5, Response="{ } | " * 5)
            strange.to_parquet(run.file("data/formatted/validation.parquet"))  # less likely, the more is learnt
        shutil.copy(ROOT / "benchmarks" / "results" / "demo-comparison.png", run.file("data/lengths.png"))
        return run

    return make


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory):
    """Headless Chromium, driven as a reader would use it."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium or chromedriver is not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking"
    for flag in (*flags.split(), "disable-component-update", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.fixture
def kaggle_server():
    """A server on 127.0.0.1 that stands in for Kaggle."""
    server = KaggleServer()
    yield server
    server.close()


@pytest.fixture
def hub_server():
    """A server on 127.0.0.1 that stands in for the Hugging Face Hub."""
    server = HubServer()
    yield server
    server.close()
