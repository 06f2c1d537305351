"""kill -9 at random moments of every stage: the same command again leads to the same bits."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.faults.series_process import SeriesProcess, results, stage_seconds

# Six kills each, one aimed at every stage; after each of them the run directory stays, is moved, or is copied elsewhere.
CHAINS = ("stays", "moved", "copied", "stays again", "stays once more")
IN_CI = 3
START = 1.5  # seconds that a stage takes beside what the manifest counts: its kernel's start
TEXTS = {".json", ".jsonl", ".yaml", ".csv", ".md", ".py", ".txt"}  # what is read again; executed notebooks are history


@pytest.mark.parametrize("way", CHAINS)
def test_killed_in_every_stage_and_run_again_it_ends_with_the_same_bits(small_run, tmp_path, way, record_fault, long):
    if CHAINS.index(way) >= IN_CI and not long:
        pytest.skip("in make faults")
    path, left_behind, random_moment = tmp_path / "run-0", {}, random.Random(f"kills {way}")
    kills = []
    for number, seconds in stage_seconds(small_run).items():
        series = SeriesProcess(path)
        there = series.wait_until(number, random_moment.uniform(0, seconds + START))
        assert there, f"it ended before it could be killed in {number}:\n{series.output}"
        kills.append((series.place, series.kill()))
        if way in ("moved", "copied") and path.exists():  # it may have been killed before it made it
            old, path = path, tmp_path / f"run-{number}"
            subprocess.run(
                ["mv" if way == "moved" else "cp", *(["-r"] if way == "copied" else []), old, path], check=True
            )
            left_behind[old] = times(old)
    last = SeriesProcess(path)
    status = last.wait()
    same = status == 0 and results(path) == results(small_run)
    for place, lost in kills:
        record_fault(f"kill -9 in {place}", survived=int(same), lost_seconds=lost)
    looked_back = [old for old, before in left_behind.items() if times(old) != before]
    pointers = [] if not left_behind else [file for file in path.rglob("*") if points_to(file, left_behind)]
    if left_behind:
        well = same and not looked_back and not pointers
        record_fault(f"run directory {way} after a kill", tried=len(left_behind), survived=len(left_behind) * well)
    assert status == 0, last.output
    assert results(path) == results(small_run), kills
    assert not looked_back and not pointers, (looked_back, pointers)
    assert not [file for file in path.rglob(".*") if file.name != ".lock"]  # what killed writers had begun


def times(folder: Path) -> dict[Path, int]:
    """When each file was written; nothing where there is no folder any more."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def points_to(file: Path, places: Iterable[Path]) -> bool:
    """Whether a file that is read again names one of `places`."""
    if file.suffix not in TEXTS or "report" in file.parts:
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return any(f"{place}/" in text or f'{place}"' in text for place in places)
