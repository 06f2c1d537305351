"""Fixtures that several files share: the embedded model, a tiny model of random weights, and one run of the whole demo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.loopback import HubServer, KaggleServer

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class DemoRun:
    """The one papermill run of the demo: its directory, how it ended, and how long it took."""

    path: Path
    returncode: int
    output: str
    seconds: float


def run_command(*words: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """`python -m utils WORDS` in a process of its own, from the checkout unless told otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "utils", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=900)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The embedded base model's folder, built on first use."""
    from utils.demo import ensure_model

    return ensure_model()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> DemoRun:
    """One run of all six notebooks by `python -m utils run --profile demo`; read it, never write to it."""
    path = tmp_path_factory.mktemp("runs") / "demo"
    started = time.monotonic()
    done = run_command("run", "--profile", "demo", "--run-dir", path)
    return DemoRun(path, done.returncode, done.stdout + done.stderr, time.monotonic() - started)


@pytest.fixture
def copied_run(demo_run: DemoRun, tmp_path: Path) -> Path:
    """A copy of the demo run that a test may damage or continue."""
    return Path(shutil.copytree(demo_run.path, tmp_path / "demo"))


@pytest.fixture(scope="session")
def tiny_model():
    """(model, tokenizer): a two-layer Llama of random weights with DeepSeek's special tokens, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils import demo_data
    from utils.demo import train_tokenizer

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
