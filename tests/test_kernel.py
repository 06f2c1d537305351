"""The pushed text, taken from the server that it was pushed to, run where there is nothing else: the whole way round.

One run serves all tests here: push, a session as on Kaggle (its folders, no network, an empty HOME, no repository),
collect, publish. Secrets of ours are planted on the way and looked for afterwards.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

from tests import fake_tokens
from tests.loopback import HubServer, KaggleServer, SecretsServer, series_cli
from tests.sessions import Machine, without_network
from utils.pipeline.stages import STAGES
from utils.project import ROOT

pytestmark = pytest.mark.series

IN_SECRETS = {"HF_TOKEN": fake_tokens.hugging_face("secrets"), "WANDB_API_KEY": fake_tokens.wandb("secrets")}
IN_DOTENV = {"HUGGINGFACE_TOKEN": fake_tokens.hugging_face("dotenv"), "wandb": fake_tokens.wandb("dotenv")}


def archived(text: str) -> list[bytes]:
    """The files inside the pushed notebook, as they are unpacked there."""
    packed = re.search(r'ARCHIVE = """\n(.+?)\n"""', "".join(json.loads(text)["cells"][2]["source"]), re.DOTALL)[1]
    archive = zipfile.ZipFile(io.BytesIO(base64.b64decode(packed)))
    return [archive.read(name) for name in archive.namelist()]


@dataclass
class Pushed:
    """What one way round left: the pushed request, the session's folders, the collected run, both servers."""

    kaggle: KaggleServer
    hub: HubServer
    root: Path
    output: str
    returncode: int
    collected: subprocess.CompletedProcess
    published: subprocess.CompletedProcess

    @property
    def run(self) -> Path:
        return self.root / "kaggle" / "working" / "runs" / "demo"

    @property
    def home(self) -> Path:
        return self.root / "laptop" / "run"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, embedded_model):
    root = tmp_path_factory.mktemp("pushed")
    (root / "laptop").mkdir()
    kaggle, hub, secrets = KaggleServer(), HubServer(), SecretsServer()
    dotenv = "".join(f"{name}={value}\n" for name, value in IN_DOTENV.items())
    (root / "laptop" / ".env").write_text(dotenv)
    done = series_cli(kaggle, root / "laptop", "push", "--profile", "demo", **IN_SECRETS)
    assert done.returncode == 0, done.stderr

    machine = Machine(root, embedded_model, IN_SECRETS | {
        "KAGGLE_USER_SECRETS_TOKEN": "a-session-token", "KAGGLE_URL_BASE": secrets.address,
    })  # fmt: skip
    (machine.empty / ".env").write_text(dotenv)
    session = machine.execute(kaggle.versions[0]["text"])
    machine.hand_output_to(kaggle, session)
    collected = series_cli(
        kaggle,
        root / "laptop",
        "collect",
        "--wait",
        "--poll",
        "0.01",
        "--run-dir",
        root / "laptop" / "run",
        **IN_SECRETS,
    )
    words = ["publish", root / "laptop" / "run", "--repo", "alice/medical", "--merged", "--no-wandb", "--yes"]
    local = {"HF_ENDPOINT": hub.address, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    published = series_cli(kaggle, root / "laptop", *words, **IN_SECRETS, **local)
    yield Pushed(kaggle, hub, root, session.stdout + session.stderr, session.returncode, collected, published)
    for server in (kaggle, hub, secrets):
        server.close()


def test_the_pushed_text_runs_the_whole_series_and_leaves_verdict_and_adapter(pushed):
    assert pushed.returncode == 0, pushed.output[-3000:]
    manifest = json.loads((pushed.run / "manifest.json").read_text())
    assert [manifest["stages"][stage.name]["state"] for stage in STAGES] == ["done"] * 6
    assert json.loads((pushed.run / "comparison" / "metrics.json").read_text())["verdict"] == "better"
    assert (pushed.run / "export" / "adapter" / "adapter_model.safetensors").stat().st_size > 10_000
    assert (pushed.run / "report" / "index.html").exists()


def test_verdict_and_figures_are_shown_in_the_notebook(pushed):
    notebook = nbformat.read(pushed.root / "empty" / "__notebook__.ipynb", as_version=4)
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("**Better.**" in data.get("text/markdown", "") for data in shown)
    assert sum("image/png" in data for data in shown) == 3


def test_what_is_heavy_is_in_scratch_and_the_state_says_so(pushed):
    state = json.loads((pushed.run / "state.json").read_text())
    assert state["state"] == "done" and set(state["left_in_scratch"]) == {"training/checkpoints"}
    assert not (pushed.run / "training" / "checkpoints").exists()
    assert list((pushed.root / "kaggle" / "temp").rglob("trainer_state.json"))


def test_without_secrets_of_the_platform_it_says_where_it_looked(pushed):
    executed = (pushed.root / "empty" / "__notebook__.ipynb").read_text(encoding="utf-8")
    assert "HF_TOKEN: environment (HF_TOKEN)" in executed


def test_nothing_was_written_into_home_or_beside_the_notebook(pushed):
    """HOME gets what Jupyter and matplotlib keep for themselves; the run does not depend on it."""
    assert sorted(path.name for path in (pushed.root / "empty").iterdir()) == [
        ".env",
        "__notebook__.ipynb",
        "kernel.ipynb",
    ]


def test_collect_brings_it_home_and_calls_it_a_pass(pushed):
    assert pushed.collected.returncode == 0, pushed.collected.stdout + pushed.collected.stderr
    assert "pass: " in pushed.collected.stdout
    assert (pushed.home / "manifest.json").read_bytes() == (pushed.run / "manifest.json").read_bytes()


def test_publish_sends_adapter_and_merged_model_from_the_laptop(pushed):
    assert pushed.published.returncode == 0, pushed.published.stderr
    sent = pushed.hub.files("alice/medical")["adapter_model.safetensors"]
    assert sent == (pushed.run / "export" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert "model.safetensors" in pushed.hub.files("alice/medical-merged")


def test_no_canary_is_found_anywhere_but_in_authorization_headers(pushed):
    """Notebooks, logs, HTML, manifest, wandb's files, the bundle, both machines' folders, every request."""
    values = [value.encode() for value in [*IN_SECRETS.values(), *IN_DOTENV.values()]]
    looked_at = 0
    for path in [*pushed.root.rglob("*"), ROOT / "kaggle_kernel.ipynb"]:
        if path.is_file() and path.name != ".env":
            content = path.read_bytes()
            assert not [value for value in values if value in content], path
            looked_at += 1
    unpacked = archived(pushed.kaggle.versions[0]["text"])
    assert len(unpacked) > 50 and not [value for value in values for content in unpacked if value in content]
    assert looked_at > 100 and list(pushed.run.glob("tracking/wandb/offline-run-*/*.wandb"))
    told = (
        pushed.output,
        pushed.collected.stdout,
        pushed.collected.stderr,
        pushed.published.stdout,
        pushed.published.stderr,
    )
    assert not [value for value in values if value in "".join(told).encode()]
    requests = [*pushed.kaggle.received, *pushed.hub.received]
    for request in requests:
        headers = {name: value for name, value in request.headers.items() if name.lower() != "authorization"}
        assert not [value for value in values if value in f"{request.path} {headers}".encode() + request.body]
    used = {
        request.headers.get("authorization", request.headers.get("Authorization", ""))
        for request in pushed.hub.received
    }
    assert f"Bearer {IN_SECRETS['HF_TOKEN']}" in used


def test_the_session_could_reach_nobody(kaggle_server):
    """Where the system allows a network of its own, not even this machine's: only what the session itself starts."""
    port = int(kaggle_server.address.rpartition(":")[2])
    probe = [sys.executable, "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=3)"]
    if without_network(*probe) == probe:
        pytest.skip("no unshare or ip here, or it is not allowed: sessions in these tests only have dead proxies")
    assert subprocess.run(probe, capture_output=True, check=False).returncode == 0  # from outside it is reached
    done = subprocess.run(without_network(*probe), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ConnectionRefusedError" in done.stderr, done.stderr
