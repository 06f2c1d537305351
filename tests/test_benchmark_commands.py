"""Every benchmark can be started on any machine: it imports without a GPU, and says what it wants."""

from __future__ import annotations

from importlib import import_module

import pytest
import typer
from typer.testing import CliRunner

from utils.project import ROOT

LIBRARIES = {"__init__", "evidence", "peers", "recipe", "tables", "training_graphs"}
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in LIBRARIES)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_shows_its_help(name):
    module = import_module(f"benchmarks.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(module.main)
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0 and "Usage" in shown.output and module.__doc__
