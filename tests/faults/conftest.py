"""What every fault test shares: the marker, and a record of what was tried, survived and lost, for the table in README.md."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from tests.faults.fuzzing import LONG, Fuzz
from tests.faults.series_process import SeriesProcess

RESULTS = "FAULTS_RESULTS"  # a folder: where it is set, records are kept there
MEMORY = 2 << 30  # that senseless input may cost


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("faults")


@pytest.fixture(scope="session")
def long() -> bool:
    """Whether this is `make faults`, which takes the time that CI does not have."""
    return bool(os.environ.get(LONG))


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that notes one fault, or many of a kind: `record_fault("kill -9 in 03", tried=5, survived=5, lost_seconds=2.1)`.

    Records of one `kind` from one test module are one row of the table: tried and survived are summed, of the lost
    seconds the worst is shown. Call it before asserting, so that a fault that was not survived is in the table too.
    Each process appends to a file of its own (pytest-xdist).
    """
    area = request.module.__name__.rpartition(".")[2].removeprefix("test_").replace("_", " ")

    def note(kind: str, *, tried: int = 1, survived: int, lost_seconds: float | None = None) -> None:
        if folder := os.environ.get(RESULTS):
            values = {"area": area, "kind": kind, "tried": tried, "survived": survived, "lost_seconds": lost_seconds}
            values["in_full"] = bool(os.environ.get(LONG))
            place = Path(folder)
            place.mkdir(parents=True, exist_ok=True)
            worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
            with (place / f"{worker}-{os.getpid()}.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values, ensure_ascii=False) + "\n")

    return note


@dataclass
class Counts:
    """What a test has tried and seen survived so far."""

    tried: int = 0
    survived: int = 0


@pytest.fixture
def recording(record_fault: Callable[..., None]) -> Callable[..., AbstractContextManager[Counts]]:
    """`with recording("a file deleted", tried=3) as counts:` notes at its end, however that comes, what `counts` says.

    Count `survived` up after the assertions; where `tried` is not known beforehand, count that up before them.
    """

    @contextmanager
    def record(kind: str, tried: int = 0) -> Iterator[Counts]:
        counts = Counts(tried)
        try:
            yield counts
        finally:
            record_fault(kind, tried=max(counts.tried, 1), survived=counts.survived)

    return record


@pytest.fixture
def fuzz(record_fault: Callable[..., None]) -> Iterator[Fuzz]:
    """`fuzz.run(kind, cases, strategy, check)`, in no more than MEMORY bytes beside what the process holds already."""
    before, used = resource.getrlimit(resource.RLIMIT_AS), psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield Fuzz(record_fault)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="session")
def small_run(shared_folder: Path, embedded_model: Path) -> Path:
    """An undisturbed run of the small demo, one for all processes of pytest-xdist; read it, never write to it."""
    path, done = shared_folder / "undisturbed", shared_folder / "undisturbed.done"
    with FileLock(shared_folder / "undisturbed.lock"):
        if not done.exists():
            series = SeriesProcess(path)
            assert series.wait() == 0, series.output
            done.touch()
    return path
