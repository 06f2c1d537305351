"""A full disk, wherever 05 meets it, is a sentence with numbers, and what was there stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from tests.exported import make_run, write_evidence
from utils import verification
from utils.agreement import NEW_TOKENS, Continuations
from utils.bases import Base
from utils.card import write_cards
from utils.disk import writing
from utils.errors import HardwareError, RunDirError
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
        write_cards(made_run, Base("tiny", None, ROOT), folders, {})


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
