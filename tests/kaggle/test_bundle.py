"""The one-file notebook: up to date, small enough for Kaggle, and made of what it says."""

from __future__ import annotations

import json
import re

import nbformat
import pytest

from utils.errors import UserError
from utils.kaggle.bundle import (
    KERNEL,
    MAXIMUM_BYTES,
    ServiceError,
    build_kernel,
    build_single,
    check_kernel,
)
from utils.pipeline.stages import STAGES


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
    with pytest.raises(ServiceError, match="out of date; run python -m utils bundle"):
        check_kernel()
    edited = json.loads(KERNEL.read_text(encoding="utf-8"))
    edited["cells"][4]["source"] = "print('edited by hand')"
    stale.write_text(json.dumps(edited))
    with pytest.raises(ServiceError, match="out of date"):
        check_kernel()
    stale.unlink()
    with pytest.raises(ServiceError, match="is missing"):
        check_kernel()


def test_parameters_are_written_as_literals_and_nothing_else_changes():
    before, after = build_kernel().cells, build_kernel("t4", {"data.path": r"C:\1\g<0>"}).cells
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == 1 and changed[0][0].source.startswith('PROFILE = "auto"  #')
    values: dict = {}
    exec(changed[0][1].source, values)
    assert values["PROFILE"] == "t4" and values["OVERRIDES"] == {"data.path": r"C:\1\g<0>"} and values["RUN_DIR"] == ""


@pytest.mark.parametrize("number", [stage.number for stage in STAGES])
def test_any_numbered_notebook_can_be_made_self_contained(number):
    notebook = build_single(number)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    original = nbformat.read(STAGES[int(number)].notebook, as_version=4)
    assert "ARCHIVE" in code[0].source and "git clone" not in code[0].source
    assert code[1].metadata.tags == ["parameters"] and "resume_from_attached(PROFILE, RUN_DIR)" in code[2].source
    sources = [cell.source for cell in notebook.cells]
    untouched = [cell.source for cell in original.cells if "git clone" not in cell.source]
    assert [source for source in sources if source in untouched] == untouched
    assert notebook.metadata.kernelspec.name == "python3" and len(json.dumps(notebook)) < MAXIMUM_BYTES


def test_a_notebook_that_there_is_not_cannot_be_bundled():
    with pytest.raises(UserError, match="no stage '07'; there are 00 to 05"):
        build_single("07")
