"""Building llama.cpp overwrites nothing, and says what is missing; the build itself takes too long for a test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import llama_cpp
from utils.errors import HardwareError


def test_a_build_never_overwrites_and_a_missing_tool_is_named(monkeypatch, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(HardwareError, match="is there already"):
        llama_cpp.build_llama_cpp(tmp_path / "there")
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    with pytest.raises(HardwareError, match="no-python is not installed"):
        llama_cpp.build_llama_cpp(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("code", ["sys.stderr.write('the reason\\n')", "print('the reason')"])
def test_a_program_that_fails_is_told_with_the_last_line_of_its_errors(code):
    aside = "print('-- incomplete', flush=True); " if "stderr" in code else ""
    words = [sys.executable, "-c", f"import sys; {code}; {aside}sys.exit(1)"]
    with pytest.raises(HardwareError, match=rf"{Path(sys.executable).name} failed \(the reason\)\."):
        llama_cpp._call(words)
