"""What the fault tests share: the table in README.md of what was tried and survived."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.table import read_rows, render

README = "FAULTS_README"  # a file: where it is set, every fault is tried in full and the table is written there


def pytest_terminal_summary(terminalreporter) -> None:
    """In the one process that hears of every test: the table."""
    rows = read_rows(terminalreporter.getreports("passed") + terminalreporter.getreports("failed"))
    if (file := os.environ.get(README)) and rows:
        Path(file).write_text(render(rows), encoding="utf-8")


@pytest.fixture(scope="session")
def long() -> bool:
    """Whether this is `make faults`, which takes the time that CI does not have."""
    return bool(os.environ.get(README))


@pytest.fixture
def fault(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`fault("kill -9 in 03", tried=5, lost_seconds=2.1)`: a row of the table, survived where the test passes.

    What tests of one module tell of one kind is summed; of the seconds the worst is shown. Call it before asserting.
    """

    def note(kind: str, tried: int = 1, lost_seconds: float | None = None) -> None:
        record_property("fault", (kind, tried, lost_seconds))

    return note
