"""Workers: fair shares, nothing lost when one fails, no process left behind."""

from __future__ import annotations

import json
import sys
import time

import pytest

from utils.evaluation.questions import Question
from utils.evaluation.workers import Workers
from utils.pipeline.run_dir import open_run
from utils.processes import Child

QUESTIONS = [Question(f"q{i}", "open", "x" * (10 + i)) for i in range(9)]


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three processes of a run, whose helpers run `command` instead of answering."""
    run = open_run("demo", tmp_path, {"hardware.processes": 3})

    def launch(self, number):
        return Child([sys.executable, "-c", launch.command], run.file(f"workers/baseline-{number}.log"))

    launch.command = "pass"
    monkeypatch.setattr(Workers, "_launch", launch)
    return run, launch


def shares(run) -> list[list[str]]:
    return [json.loads(path.read_text()) for path in sorted(run.file("workers").glob("*.json"))]


def test_every_question_is_in_exactly_one_share_and_shares_are_alike(three):
    run, _ = three
    with Workers(run, "base") as helpers:
        mine = [q.id for q in helpers.start(QUESTIONS)]
        helpers.wait()
    everything = [mine, *shares(run)]
    assert sorted(name for share in everything for name in share) == [q.id for q in QUESTIONS] and {
        len(share) for share in everything
    } == {3}


def test_few_questions_are_not_worth_another_process(three):
    run, _ = three
    with Workers(run, "base") as helpers:
        assert len(helpers.start(QUESTIONS[:5])) == 5
    assert shares(run) == []


def test_a_process_that_fails_is_told_with_its_last_line_and_fails_nothing(three, capsys):
    run, launch = three
    launch.command = "raise SystemExit('no memory')"
    with Workers(run, "base") as helpers:
        helpers.start(QUESTIONS)
        helpers.wait()
    assert "process 1 failed (no memory); its questions are answered here" in capsys.readouterr().out


def test_leaving_early_ends_the_processes(three):
    run, launch = three
    launch.command = "import time; time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(run, "base") as helpers:
        helpers.start(QUESTIONS)
        running = list(helpers._started)
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in running) and time.monotonic() - started < 10


def test_without_a_second_gpu_one_process_does_everything(tmp_path):
    helpers = Workers(open_run("demo", tmp_path), "base")
    assert helpers.count == 1 and len(helpers.start(QUESTIONS)) == 9
