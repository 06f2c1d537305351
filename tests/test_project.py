"""Where things are, and what a process of ours is told about it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from utils import hardware, pins, processes, project
from utils.kaggle.bundle import TEMPLATE, build_kernel
from utils.project import NOTEBOOKS, ROOT


def test_a_process_finds_what_this_one_finds(monkeypatch):
    """Dropping PYTHONPATH cost the second GPU, and on another machine the check of the exports."""
    monkeypatch.setenv("PYTHONPATH", f"/somewhere{os.pathsep}{os.pathsep}/else")
    assert project.python_path().split(os.pathsep) == [str(ROOT), "/somewhere", "/else"]


def test_a_printed_command_runs_when_it_is_pasted_whatever_the_folders_are_called(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/my tools/python")
    line = project.command("run", "--run-dir", Path("/my runs/demo"), "--set", "train.max_steps=10")
    assert line == "'/my tools/python' -m utils run --run-dir '/my runs/demo' --set train.max_steps=10"


def test_every_printed_command_with_words_has_them_quoted():
    """Words after `{command()}` in an f-string would break on a path with a space."""
    sources = [path for path in (ROOT / "utils").rglob("*.py") if "{command()}" in path.read_text(encoding="utf-8")]
    assert sources == []


def test_no_process_is_started_with_a_path_of_its_own_making():
    """Every environment that names PYTHONPATH takes it from python_path(): in the pushed kernel's cells and in tests too."""
    files = [path for folder in ("utils", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    kernel = nbformat.read(TEMPLATE, as_version=4)
    named = 0
    sources.pop("tests/sessions.py")  # another machine, which knows no checkout
    for name, source in {**sources, "the kernel's cell": kernel.cells[4].source}.items():
        for node in ast.walk(ast.parse(source)):
            pairs = []
            if isinstance(node, ast.Dict):
                pairs = [(getattr(k, "value", None), v) for k, v in zip(node.keys, node.values, strict=True)]
            elif isinstance(node, ast.Call):
                pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
            for key, value in pairs:
                if key == "PYTHONPATH":
                    named += 1
                    assert ast.unparse(value) == "python_path()", f"{name}, line {value.lineno}"
    assert named >= 10


def test_threads_that_wait_leave_the_processor_to_those_that_work():
    code = "import utils, os; print(os.environ['GOMP_SPINCOUNT'])"
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    for given, wanted in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment | given, capture_output=True, text=True
        )
        assert done.stdout.strip() == wanted


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """`colab(mount)`: Colab, whose Drive is mounted by `mount(path)` at tmp_path; pip is never asked."""

    def arrange(mount) -> None:
        package, module, drive = (ModuleType(f"google{rest}") for rest in ("", ".colab", ".colab.drive"))
        drive.mount, module.drive, package.colab = mount, drive, module
        for loaded in (package, module, drive):
            monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
        monkeypatch.setattr(hardware, "where", lambda: "colab")
        monkeypatch.setattr(pins, "install_missing", lambda restart: None)
        monkeypatch.setattr(project, "DRIVE", tmp_path / "drive" / "MyDrive")

    return arrange


def test_on_colab_a_notebooks_bootstrap_asks_for_drive_and_runs_are_kept_there(colab, tmp_path):
    colab(lambda place: Path(place, "MyDrive").mkdir(parents=True))
    before = project.runs_dir()
    project.prepare(drive=True)
    assert before == ROOT / "runs" and project.runs_dir() == tmp_path / "drive" / "MyDrive" / project.NAME / "runs"


def test_where_drive_is_refused_a_sentence_says_what_will_not_be_found(colab, capsys):
    def refuse(place):
        raise ValueError("mount failed")

    colab(refuse)
    project.prepare(drive=True)
    said = capsys.readouterr().out
    assert said.startswith("Google Drive is not mounted (ValueError): this run directory ends with this machine, and")
    assert "the next notebook, on another one, will not find it" in said and "kaggle_kernel.ipynb" in said


def test_drive_is_asked_for_by_nobody_else(colab, monkeypatch):
    def ask(place):
        raise AssertionError("asked")

    colab(ask)
    project.prepare()  # the bundle: one machine has it all
    monkeypatch.setattr(processes, "is_executed", lambda: True)
    project.prepare(drive=True)  # by papermill: Colab's question would never be answered
    monkeypatch.setattr(hardware, "where", lambda: "local")
    monkeypatch.setattr(processes, "is_executed", lambda: False)
    project.prepare(drive=True)


def test_every_badge_of_the_series_opens_the_bundle():
    """A numbered notebook alone finds nothing of those before it, unless Drive is between them."""
    bundle = f"colab.research.google.com/github/{project.REPOSITORY}/blob/main/kaggle_kernel.ipynb"
    setup = nbformat.read(NOTEBOOKS / "00_setup.ipynb", as_version=4)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (readme.partition("## The notebooks")[0], setup.cells[0].source, build_kernel().cells[0].source):
        assert bundle in text
