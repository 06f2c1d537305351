"""As on Colab: the bundle on one machine, and the numbered notebooks, each on a machine of its own, with Drive between them.

`make colab` runs these with the versions of Colab's image: $COLAB_PYTHON is that environment's Python, and what came out
is written to the file $COLAB_RESULT.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from tests.drift import TABLE
from tests.e2e.conftest import SMALL, read_manifest
from tests.sessions import Colab, leave_no_trace
from utils.files import write_json
from utils.kaggle.bundle import build_kernel
from utils.pipeline.stages import STAGES, Stage
from utils.project import NAME, REF, REPOSITORY, ROOT

PYTHON = os.environ.get("COLAB_PYTHON", sys.executable)
RESULT = os.environ.get("COLAB_RESULT")
LOADED = """
import importlib.metadata, json, sys
top = {name.partition(".")[0] for name in sys.modules}
owners = importlib.metadata.packages_distributions().items()
print(json.dumps(sorted({name.lower() for module, names in owners if module in top for name in names})))
"""
NAMED = ("ipython", "ipykernel", "jupyter-client", "torch", "transformers", "pandas", "pyarrow", "numpy")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> dict[str, str]:
    """Variables by which git takes this checkout's files for github.com/alice/series, at the tag that badges name."""
    origin = tmp_path_factory.mktemp("github") / "series"
    unpacked = shutil.ignore_patterns("__pycache__")
    for name in ("utils", "notebooks"):
        shutil.copytree(ROOT / name, origin / name, ignore=unpacked)
    shutil.copy(ROOT / "requirements.txt", origin)
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", REF]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    rule = {"GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf"}
    return rule | {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": "https://github.com/alice/series"}


@pytest.fixture
def machine(tmp_path, repository, embedded_model):
    """`machine(name, drive)`: a new one, where the demo's base model, which each would build, is at hand."""

    def make(name: str, drive: Path | None) -> Colab:
        return Colab(tmp_path / name, drive, PYTHON, **repository, XDG_CACHE_HOME=str(embedded_model.parent.parent))

    return make


def opened(stage: Stage, **overrides) -> str:
    """A numbered notebook as its badge opens it, for the demo."""
    notebook = json.loads(stage.notebook.read_text(encoding="utf-8").replace(REPOSITORY, "alice/series"))
    (cell,) = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    source = "".join(cell["source"]).replace('PROFILE = "auto"', 'PROFILE = "demo"')
    cell["source"] = source.replace("OVERRIDES = {}", f"OVERRIDES = {overrides!r}")
    return json.dumps(notebook)


def versions() -> dict[str, str]:
    """What the environment of the image has, asked there."""
    code = f"import json, platform, importlib.metadata as m; print(json.dumps({{'python': platform.python_version()}} | {{n: m.version(n) for n in {NAMED}}}))"  # fmt: skip
    return json.loads(subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout)


def keep(case: str, **found: object) -> None:
    """Add a case that passed to the file that `make colab` asks for."""
    if RESULT:
        known = json.loads(Path(RESULT).read_text()) if Path(RESULT).exists() else {}
        about = {"date": time.strftime("%Y-%m-%d"), "processors": os.cpu_count(), "versions": versions()}
        write_json(Path(RESULT), known | about | {case: found})


def test_each_notebook_on_a_machine_of_its_own_finds_on_drive_what_those_before_it_left(machine, tmp_path):
    """One machine ends in the middle of 01: the next one resumes."""
    drive, seconds = tmp_path / "drive", {}
    drive.mkdir()
    run = drive / NAME / "runs" / "demo"
    answers = run / "baseline" / "answers.jsonl"
    for stage in STAGES:
        started = time.monotonic()
        settings = {**SMALL, "generate.batch_size": 4} if stage is STAGES[0] else {}
        if stage is STAGES[1]:
            cut = cut_short(machine("cut", drive), opened(stage), answers)
        here = machine(stage.name, drive)
        said = here.execute(opened(stage, **settings))
        assert "Mounted at /content/drive" in said and f"written to /content/drive/MyDrive/{NAME}/runs/demo" in said
        assert sorted(path.name for path in here.content.iterdir()) == ["drive", "executed.json", "series"]
        seconds[stage.name] = round(time.monotonic() - started, 1)
        if stage is STAGES[1]:
            assert answers.read_bytes().startswith(cut) and len(answers.read_bytes()) > len(cut)
    assert [read_manifest(run)["stages"][stage.name]["state"] for stage in STAGES] == ["done"] * 6
    assert sorted(path.name for path in drive.iterdir()) == [NAME]
    assert not [path for path in drive.rglob("*") if path.name in ("huggingface", ".cache")]
    keep("00 to 05, a machine each, Drive between them, one more cut off in 01", seconds=seconds)


def cut_short(here: Colab, text: str, answers: Path) -> bytes:
    """What lay in `answers` when the machine was gone: it is taken away once the first ones are there."""
    with here.start(text) as session:
        for _ in range(1200):
            if session.poll() is not None or (answers.exists() and answers.stat().st_size):
                break
            time.sleep(0.1)
        for process in psutil.Process(session.pid).children():  # unshare, with which the whole machine ends
            process.kill()
    leave_no_trace()
    assert read_manifest(answers.parent.parent)["stages"]["01_baseline_inference"]["state"] == "running"
    return answers.read_bytes().rpartition(b"\n")[0]


def test_without_drive_a_notebook_says_that_the_next_one_will_not_find_it(machine):
    here = machine("alone", None)
    said = here.execute(opened(STAGES[0], **SMALL))
    assert (
        "Google Drive is not mounted (MessageError)" in said and "the next notebook, on another one, will not" in said
    )
    assert "written to /content/series/runs/demo" in said


def test_the_bundle_runs_on_one_machine_and_asks_for_nothing(machine):
    started, here = time.monotonic(), machine("bundle", None)
    said = here.execute(json.dumps(build_kernel("demo", {} if RESULT else SMALL)))
    assert [read_manifest(here.content / "runs/demo")["stages"][stage.name]["state"] for stage in STAGES] == [
        "done"
    ] * 6
    assert "Drive" not in said and (here.content / "runs/demo/report/index.html").exists()
    keep("the bundle, the whole demo", seconds=round(time.monotonic() - started, 1))


def test_nothing_that_the_kernel_has_loaded_before_its_first_cell_is_replaced(machine):
    """With the image's IPython and ipykernel; google.colab itself loads no more of it (colabtools' data_table.py)."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LOADED)])
    loaded = json.loads(machine("empty", None).execute(nbformat.writes(notebook)))
    image = json.loads(TABLE.read_text(encoding="utf-8"))
    assert "ipykernel" in loaded and not set(loaded) & set(image["after"])
    keep("loaded before the first cell", packages=loaded)
