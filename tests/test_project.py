"""Where things are, and what a process of ours is told about it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat

from utils import project
from utils.kaggle.bundle import TEMPLATE
from utils.project import ROOT


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
