"""The one-file notebook: up to date, small enough for Kaggle, and able to run where there is nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

from tests.sessions import Machine
from utils.kaggle.bundle import (
    KERNEL,
    MAXIMUM_BYTES,
    BundleError,
    build_kernel,
    build_single,
    check_kernel,
    with_parameters,
)
from utils.models.tiny import cache_dir
from utils.pipeline.stages import STAGES
from utils.sealed import seal


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


def test_the_archive_is_listed_file_by_file_and_its_checksum_is_compared():
    (cell,) = [cell for cell in build_kernel().cells if "ARCHIVE" in cell.source and "zipfile" in cell.source]
    assert "#   notebooks/03_lora_training.ipynb (" in cell.source and "#   utils/training/train.py (" in cell.source
    damaged = re.sub(r'(ARCHIVE = """\n)(.)', lambda found: found[1] + ("A" if found[2] != "A" else "B"), cell.source)
    with pytest.raises(ValueError, match="altered: its archive does not match"):
        exec(damaged, {})


def test_a_kernel_that_is_out_of_date_is_told(tmp_path, monkeypatch):
    from utils.kaggle import bundle

    stale = tmp_path / "kaggle_kernel.ipynb"
    stale.write_text(KERNEL.read_text(encoding="utf-8").replace('CONTENT = \\"', 'CONTENT = \\"0'))
    monkeypatch.setattr(bundle, "KERNEL", stale)
    with pytest.raises(BundleError, match="out of date; run python -m utils bundle"):
        check_kernel()
    edited = json.loads(KERNEL.read_text(encoding="utf-8"))
    edited["cells"][4]["source"] = "print('edited by hand')"
    stale.write_text(json.dumps(edited))
    with pytest.raises(BundleError, match="out of date"):
        check_kernel()
    stale.unlink()
    with pytest.raises(BundleError, match="is missing"):
        check_kernel()


def test_parameters_are_replaced_as_literals_and_nothing_else_is():
    before = json.loads(KERNEL.read_text(encoding="utf-8"))
    after = with_parameters(before, {"PROFILE": "t4", "OVERRIDES": {"data.path": r"C:\1\g<0>"}})
    changed = [(a, b) for a, b in zip(before["cells"], after["cells"], strict=True) if a != b]
    assert len(changed) == 1
    values: dict = {}
    exec(changed[0][1]["source"], values)
    assert values["PROFILE"] == "t4" and values["OVERRIDES"] == {"data.path": r"C:\1\g<0>"} and values["RUN_DIR"] == ""
    with pytest.raises(BundleError, match="no parameter PROFIL"):
        with_parameters(before, {"PROFIL": "t4"})


@pytest.mark.parametrize("number", [stage.number for stage in STAGES])
def test_any_numbered_notebook_can_be_made_self_contained(number):
    notebook = build_single(number)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    original = nbformat.read(STAGES[int(number)].notebook, as_version=4)
    assert "ARCHIVE" in code[0].source and "git" not in code[0].source.split('"""')[2]
    assert code[1].metadata.tags == ["parameters"] and "adopt_attached(PROFILE, RUN_DIR)" in code[2].source
    sources = [cell.source for cell in notebook.cells]
    untouched = [cell.source for cell in original.cells if "SERIES, REPOSITORY, REF" not in cell.source]
    assert [source for source in sources if source in untouched] == untouched
    assert notebook.metadata.kernelspec.name == "python3" and len(json.dumps(notebook)) < MAXIMUM_BYTES


def test_a_notebook_that_there_is_not_cannot_be_bundled():
    with pytest.raises(BundleError, match="no notebook '07'; there are 00 to 05"):
        build_single("07")


@pytest.mark.series
@pytest.mark.parametrize(
    ("number", "layout"),
    [("04", "notebooks/alice/03-lora-training/runs/demo"), ("02", "00-setup/runs/demo")],
    ids=["today's layout", "the older layout"],
)
def test_a_single_notebook_goes_on_with_an_attached_output(demo_run, tmp_path, number, layout):
    """Alone in an empty folder, on a machine laid out as Kaggle's: an earlier output is attached, and cannot be written."""
    machine = Machine(tmp_path / "m", cache_dir())
    name = STAGES[int(number)].name
    manifest = json.loads((demo_run.path / "manifest.json").read_text())
    del manifest["stages"][name]
    files = {p.relative_to(demo_run.path).as_posix(): p.read_bytes() for p in demo_run.path.rglob("*") if p.is_file()}
    machine.attach(files | {"manifest.json": json.dumps(seal(manifest)).encode()}, layout)
    done = machine.execute(nbformat.writes(build_single(number)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"going on with {machine.kaggle / 'input' / layout}" in (machine.empty / "__notebook__.ipynb").read_text()
    stages = json.loads((machine.working / "runs" / "demo" / "manifest.json").read_text())["stages"]
    assert stages[name]["state"] == "done" and len(stages) == 6


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
