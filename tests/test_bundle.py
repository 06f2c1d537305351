"""The one-file notebook: up to date, small enough for Kaggle, and able to run where there is nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

from utils.bundle import KERNEL, MAXIMUM_BYTES, build_kernel, check_kernel
from utils.project import ROOT


def test_the_committed_kernel_carries_the_files_as_they_are():
    check_kernel()


def test_it_is_the_same_for_the_same_files_and_small_enough_for_kaggle():
    notebook = build_kernel()
    assert notebook == build_kernel()
    nbformat.validate(notebook)
    assert len(json.dumps(notebook)) < MAXIMUM_BYTES


def test_it_has_no_outputs_and_names_its_kernel():
    notebook = nbformat.read(KERNEL, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_the_kernels_metadata_writes_every_switch_out_and_its_title_makes_its_id():
    """An enable_gpu alone once gave a P100; a title that makes another slug only warns, and a second kernel appears."""
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text())
    assert (metadata["enable_gpu"], metadata["enable_tpu"], metadata["enable_internet"]) == (True, False, True)
    assert metadata["machine_shape"] == "NvidiaTeslaT4" and metadata["is_private"] is True
    assert metadata["code_file"] == KERNEL.name
    slug = re.sub(r"[^a-z0-9]+", "-", metadata["title"].lower()).strip("-")
    assert metadata["id"].split("/")[1] == slug


@pytest.mark.series
def test_it_runs_alone_in_an_empty_directory(copied_run, tmp_path):
    """Everything in the run directory is current, so the series inside has nothing to do but to find that out."""
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SERIES_ROOT")}
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(KERNEL),
        "out.ipynb",
        "-p",
        "PROFILE",
        "demo",
        "-p",
        "RUN_DIR",
        str(copied_run),
    ]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    executed = (empty / "out.ipynb").read_text(encoding="utf-8")
    assert "\\u001b[2K" not in executed  # a log is no terminal
    assert executed.count("unchanged, not run again") == 6 and "image/png" in executed and "**Better.**" in executed
