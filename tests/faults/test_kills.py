"""kill -9 at random moments of every stage: the same command again leads to the same bits."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.faults.series_process import SeriesProcess, results, stage_seconds

CHAINS = 5  # six kills each, one aimed at every stage
START = 1.5  # seconds that a stage takes beside what the manifest counts: its kernel's start


@pytest.mark.parametrize("chain", range(CHAINS))
def test_killed_in_every_stage_and_run_again_it_ends_with_the_same_bits(small_run, tmp_path, chain, record_fault):
    path, random_moment = tmp_path / "run", random.Random(f"kills {chain}")
    kills = []
    for number, seconds in stage_seconds(small_run).items():
        series = SeriesProcess(path)
        there = series.wait_until(number, random_moment.uniform(0, seconds + START))
        assert there, f"it ended before it could be killed in {number}:\n{series.output}"
        lost = series.kill()
        kills.append((series.stage, lost))
        print(f"killed in {series.stage}: {lost:.1f} s lost")
    last = SeriesProcess(path)
    status = last.wait()
    same = status == 0 and results(path) == results(small_run)
    for stage, lost in kills:
        record_fault(f"kill -9 in {stage}", survived=int(same), lost_seconds=lost)
    assert status == 0, last.output
    assert results(path) == results(small_run)
    scratch = [file for file in path.rglob(".*") if file.name != ".lock"]
    assert not scratch, scratch
    shutil.rmtree(path)
