"""A full disk, wherever 05 meets it, is a sentence with numbers, and what was there stays."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.exported import make_run, write_evidence
from utils.errors import HardwareError, RunDirError
from utils.export import verify as verification
from utils.export.compare_logits import NEW_TOKENS, Continuations
from utils.export.model_card import write_cards
from utils.files import disk_error, writing
from utils.project import ROOT


@pytest.fixture
def full(monkeypatch):
    """Nothing more can be written, by whatever way Python writes."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for way in ("write_text", "write_bytes"):
        monkeypatch.setattr(Path, way, refuse)


@pytest.fixture
def made_run(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path / "run")
    write_evidence(run)
    run.file("export").mkdir(exist_ok=True)
    return run


@pytest.mark.parametrize(
    ("number", "kind", "sentence"),
    [
        (errno.EDQUOT, HardwareError, r"kept needs 0\.5 GiB at .*, and \d+\.\d GiB are free now"),
        (errno.EROFS, RunDirError, r"kept could not be written \(Read-only file system\)"),
    ],
)
def test_what_a_disk_refuses_is_told_by_its_kind(tmp_path, number, kind, sentence):
    with pytest.raises(kind, match=sentence), writing(tmp_path / "kept", 0.5):
        raise OSError(number, os.strerror(number))


def test_a_disk_that_fills_up_at_the_cards_is_told(made_run, request):
    folders = {"adapter": made_run.file("export")}
    request.getfixturevalue("full")
    with pytest.raises(HardwareError, match=r"The disk filled up: README\.md needs .* GiB are free now"):
        write_cards(made_run, folders, {})


def test_a_disk_that_fills_up_at_the_record_is_told(made_run, full):
    made_run.file("export/README.md").touch()
    with pytest.raises(HardwareError, match=r"The disk filled up: verify\.json needs"):
        verification.write_record(made_run, {}, {})


def test_a_disk_that_fills_up_at_the_reference_is_told(made_run, full, monkeypatch):
    answers = Continuations([[1]], torch.zeros(1, 4), torch.zeros(1, NEW_TOKENS, 2))
    monkeypatch.setattr(verification, "continue_greedily", lambda *_: answers)
    with pytest.raises(HardwareError, match=r"The disk filled up: reference\.safetensors needs"):
        verification.write_reference(made_run)
    assert not list(made_run.file("export").iterdir())


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            HardwareError,
            r"The disk is full \(No space left on device\): \d",
        ),
        (
            OSError(errno.EFBIG, "File too large", "data/train.parquet"),
            HardwareError,
            "free at data/train.parquet; free some space",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            RunDirError,
            r"cannot be written \(Read-only file system\); resume",
        ),
        (Exception("No space left on device (os error 28)"), HardwareError, "The disk is full"),  # tokenizers
        (RuntimeError("[Errno 28] Error writing bytes to file"), HardwareError, "The disk is full"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            HardwareError,
            r"full \(PytorchStreamWriter",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), HardwareError, "The disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"), HardwareError, "full"),
    ],
)
def test_whichever_library_met_the_disk_it_is_one_sentence(tmp_path, error, kind, sentence):
    told = disk_error(error, tmp_path)
    assert type(told) is kind and "\n" not in str(told)
    assert re.search(sentence, str(told))


def test_a_refusal_to_read_or_to_connect_is_not_told_as_one_to_write(tmp_path):
    assert disk_error(Exception("Read-only file system (os error 30)"), tmp_path)
    for error in (
        PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "model.safetensors")),
        PermissionError(errno.EPERM, "Operation not permitted"),
        ConnectionError("Failed to establish a new connection: [Errno 13] Permission denied"),
    ):
        assert disk_error(error, tmp_path) is None


def test_what_is_no_disk_trouble_is_left_alone(tmp_path):
    for error in (
        ValueError("28"),
        OSError(errno.ENOENT, "No such file"),
        HardwareError("[Errno 28]"),
        RuntimeError("no"),
    ):
        assert disk_error(error, tmp_path) is None


def test_a_notebook_shows_the_sentence_and_no_stack_and_other_errors_as_ever(tmp_path):
    code = f"""
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell
from utils.files import tell_disk_errors
shell = InteractiveShell.instance(colors="nocolor")
tell_disk_errors(Path({str(tmp_path)!r}))
shell.run_cell("raise OSError(28, 'No space left on device')")
print("NEXT")
shell.run_cell("1 / 0")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, other = done.stdout.split("NEXT")
    assert first.strip().startswith("HardwareError: The disk is full") and len(first.strip().splitlines()) == 1
    assert "ZeroDivisionError" in other and "Traceback" in other
