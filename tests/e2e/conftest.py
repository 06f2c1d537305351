"""One pushed session of the whole series, small, that the tests of the kernel, of a chain and of a single notebook share."""

from __future__ import annotations

import json
import pickle
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from filelock import FileLock

from tests import fake_tokens
from tests.loopback import HubServer, KaggleServer, Received, series_cli
from tests.sessions import Machine

IN_ENVIRONMENT = {"HF_TOKEN": fake_tokens.hugging_face("session"), "WANDB_API_KEY": fake_tokens.wandb("session")}
IN_DOTENV = {"HUGGINGFACE_TOKEN": fake_tokens.hugging_face("dotenv"), "wandb": fake_tokens.wandb("dotenv")}
SMALL = {
    "data.train_rows": 192, "data.eval_rows": 32, "train.num_train_epochs": 1, "generate.max_new_tokens": 64,
    "evaluate.resamples": 1000, "export.prompts": 2, "export.merged": "true",  # on Kaggle, on request only
}  # fmt: skip
SETTINGS = ["--profile", "demo", *(word for key, value in SMALL.items() for word in ("--set", f"{key}={value}"))]


@dataclass
class Pushed:
    """What one way round left: the pushed text, the session's folders, the collected run, all that was sent and printed."""

    root: Path
    text: str
    session: subprocess.CompletedProcess
    collected: subprocess.CompletedProcess
    published: subprocess.CompletedProcess
    requests: list[Received] = field(default_factory=list)
    uploaded: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.root / "kaggle" / "working" / "runs" / "demo"

    @property
    def home(self) -> Path:
        return self.root / "laptop" / "run"


@pytest.fixture(scope="session")
def pushed(shared_folder: Path, embedded_model: Path) -> Pushed:
    """Push, a session as on Kaggle, collect, publish; secrets of ours are planted on the way. Read it, never write to it."""
    result = shared_folder / "pushed.pickle"
    with FileLock(shared_folder / "pushed.lock"):
        if not result.exists():
            result.write_bytes(pickle.dumps(_go_round(shared_folder / "pushed", embedded_model)))
    return pickle.loads(result.read_bytes())


def _go_round(root: Path, model: Path) -> Pushed:
    laptop = root / "laptop"
    laptop.mkdir(parents=True)
    kaggle, hub = KaggleServer(), HubServer()
    dotenv = "".join(f"{name}={value}\n" for name, value in IN_DOTENV.items())
    machine = Machine(root, model, IN_ENVIRONMENT)
    for folder in (laptop, machine.empty):
        (folder / ".env").write_text(dotenv)
    try:
        done = series_cli(kaggle, laptop, "push", *SETTINGS, **IN_ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        text = kaggle.versions[0]["text"]
        session = machine.execute(text)
        machine.hand_output_to(kaggle, session)
        words = ("collect", "--wait", "--poll", "0.01", "--run-dir", laptop / "run")
        collected = series_cli(kaggle, laptop, *words, **IN_ENVIRONMENT)
        words = ("publish", laptop / "run", "--repo", "alice/medical", "--merged", "--no-wandb", "--yes")
        local = {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
        }
        published = series_cli(kaggle, laptop, *words, **IN_ENVIRONMENT, **local)
        uploaded = {name: hub.files(name) for name in hub.repos}
        return Pushed(root, text, session, collected, published, [*kaggle.received, *hub.received], uploaded)
    finally:
        kaggle.close()
        hub.close()


def read_manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text(encoding="utf-8"))
