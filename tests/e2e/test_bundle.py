"""One numbered notebook with the package inside, opened alone on a machine laid out as Kaggle's."""

from __future__ import annotations

import json

import nbformat

from tests.sessions import Machine, read_files
from utils.kaggle.bundle import build_single

LAYOUT = "00-setup/runs/demo"  # the older one; the chain's is today's


def test_a_single_notebook_resumes_an_attached_output(pushed, embedded_model, tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("s") / "m", embedded_model)
    files = read_files(pushed.run)
    manifest = json.loads(files["manifest.json"])
    del manifest["stages"]["02_dataset_formatting"]
    manifest.pop("seal", None)
    machine.attach(files | {"manifest.json": json.dumps(manifest).encode()}, LAYOUT)
    done = machine.execute(nbformat.writes(build_single("02")))
    assert done.returncode == 0, done.stderr[-2000:]
    executed = (machine.empty / "__notebook__.ipynb").read_text(encoding="utf-8")
    assert f"resuming /kaggle/input/{LAYOUT}" in executed
    stages = json.loads((machine.working / "runs" / "demo" / "manifest.json").read_text())["stages"]
    assert stages["02_dataset_formatting"]["state"] == "done" and len(stages) == 6
