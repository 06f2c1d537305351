"""The pushed text, taken from the server that it was pushed to, run where there is nothing else: the whole way round."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import zipfile

import nbformat

from tests.e2e.conftest import IN_DOTENV, IN_ENVIRONMENT, read_manifest
from tests.sessions import isolated, leave_no_trace
from utils.pipeline.stages import STAGES


def archived(text: str) -> list[bytes]:
    """The files inside the pushed notebook, as they are unpacked there."""
    packed = re.search(r'ARCHIVE = """\n(.+?)\n"""', "".join(json.loads(text)["cells"][2]["source"]), re.DOTALL)[1]
    archive = zipfile.ZipFile(io.BytesIO(base64.b64decode(packed)))
    return [archive.read(name) for name in archive.namelist()]


def test_the_pushed_text_runs_the_whole_series_and_leaves_adapter_and_report(pushed):
    assert pushed.session.returncode == 0, pushed.session.stderr[-3000:]
    stages = read_manifest(pushed.run)["stages"]
    assert [stages[stage.name]["state"] for stage in STAGES] == ["done"] * 6
    assert (pushed.run / "export" / "adapter" / "adapter_model.safetensors").stat().st_size > 10_000
    assert (pushed.run / "report" / "index.html").exists()


def test_verdict_and_figures_are_shown_in_the_notebook(pushed):
    notebook = nbformat.read(pushed.root / "empty" / "__notebook__.ipynb", as_version=4)
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    verdict = json.loads((pushed.run / "comparison" / "metrics.json").read_text())["verdict"].capitalize()
    assert any(f"**{verdict}.**" in data.get("text/markdown", "") for data in shown)
    assert sum("image/png" in data for data in shown) == 3
    text = (pushed.root / "empty" / "__notebook__.ipynb").read_text(encoding="utf-8")
    assert "HF_TOKEN: environment (HF_TOKEN)" in text and "\\u001b[2K" not in text  # a log is no terminal


def test_the_checkpoints_are_gone_and_nothing_lies_beside_the_notebook(pushed):
    assert json.loads((pushed.run / "state.json").read_text())["state"] == "done"
    assert not (pushed.run / "training" / "checkpoints").exists()
    left = sorted(path.name for path in (pushed.root / "empty").iterdir())
    assert left == [".env", "__notebook__.ipynb", "kernel.ipynb"]


def test_collect_brings_it_home_and_calls_it_a_pass(pushed):
    assert pushed.collected.returncode == 0, pushed.collected.stdout + pushed.collected.stderr
    assert "pass: " in pushed.collected.stdout
    assert (pushed.home / "manifest.json").read_bytes() == (pushed.run / "manifest.json").read_bytes()


def test_publish_sends_adapter_and_merged_model_from_the_laptop(pushed):
    assert pushed.published.returncode == 0, pushed.published.stderr
    sent = pushed.uploaded["alice/medical"]["adapter_model.safetensors"]
    assert sent == (pushed.run / "export" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert "model.safetensors" in pushed.uploaded["alice/medical-merged"]


def test_no_canary_is_found_anywhere_but_in_authorization_headers(pushed):
    """Notebooks, logs, HTML, manifest, wandb's files, the bundle, both machines' folders, every request."""
    values = [value.encode() for value in [*IN_ENVIRONMENT.values(), *IN_DOTENV.values()]]
    files = [path for path in pushed.root.rglob("*") if path.is_file() and path.name != ".env"]
    assert len(files) > 100 and list(pushed.run.glob("tracking/wandb/offline-run-*/*.wandb"))
    for path in files:
        content = path.read_bytes()
        assert not [value for value in values if value in content], path
    unpacked = archived(pushed.text)
    assert len(unpacked) > 50 and not [value for value in values for content in unpacked if value in content]
    printed = "".join(done.stdout + done.stderr for done in (pushed.session, pushed.collected, pushed.published))
    assert not [value for value in values if value in printed.encode()]
    used = set()
    for request in pushed.requests:
        headers = {name.lower(): value for name, value in request.headers.items()}
        used.add(headers.pop("authorization", ""))
        assert not [value for value in values if value in f"{request.path} {headers}".encode() + request.body]
    assert f"Bearer {IN_ENVIRONMENT['HF_TOKEN']}" in used


def test_the_session_could_reach_nobody(kaggle_server, tmp_path):
    """Not even this machine's servers: only what the session itself starts."""
    port = int(kaggle_server.address.rpartition(":")[2])
    probe = [sys.executable, "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=3)"]
    assert subprocess.run(probe, capture_output=True, check=False).returncode == 0  # from outside it is reached
    done = subprocess.run(isolated(tmp_path, *probe), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ConnectionRefusedError" in done.stderr, done.stderr


def test_the_end_of_one_session_leaves_another_its_folder(tmp_path):
    """Removing a mount point takes the mount away from every session that has it."""
    (tmp_path / "mine").touch()
    command = isolated(tmp_path, "sh", "-c", "echo ready; read line; ls /kaggle")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout.readline() == "ready\n"
        leave_no_trace()  # as another session's end does
        assert session.communicate("\n")[0] == "mine\n"
