"""Workers: fair shares, nothing lost when one fails, no process left behind."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from utils.evaluation import workers
from utils.evaluation.questions import Question
from utils.evaluation.workers import Workers
from utils.pipeline.run_dir import open_run

QUESTIONS = [Question(f"q{i}", "open", "x" * (10 + i)) for i in range(9)]


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three processes of a run, whose helpers run `command` instead of answering."""
    run = open_run("demo", tmp_path, {"hardware.processes": 3})
    shares: dict[int, list[str]] = {}

    def launch(self, number, questions, command="pass"):
        shares[number] = [q.id for q in questions]
        log = self._file(number, "log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            return subprocess.Popen([sys.executable, "-c", launch.command], stdin=subprocess.PIPE, stderr=stream)

    launch.command = "pass"
    monkeypatch.setattr(Workers, "_launch", launch)
    return run, shares, launch


def test_every_question_is_in_exactly_one_share_and_shares_are_alike(three):
    run, shares, _ = three
    with Workers(run, "baseline") as helpers:
        mine = [q.id for q in helpers.start(QUESTIONS)]
        helpers.wait()
    everything = [mine, *shares.values()]
    assert sorted(name for share in everything for name in share) == [q.id for q in QUESTIONS] and {
        len(share) for share in everything
    } == {3}


def test_few_questions_are_not_worth_another_process(three):
    run, shares, _ = three
    with Workers(run, "baseline") as helpers:
        assert len(helpers.start(QUESTIONS[:5])) == 5
    assert shares == {}


def test_a_process_that_fails_is_told_with_its_last_line_and_fails_nothing(three, capsys):
    run, _, launch = three
    launch.command = "raise SystemExit('no memory')"
    with Workers(run, "baseline") as helpers:
        helpers.start(QUESTIONS)
        helpers.wait()
    assert "process 1 failed (no memory); its questions are answered here" in capsys.readouterr().out


def test_leaving_early_ends_the_processes(three):
    run, _, launch = three
    launch.command = "import time; time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(run, "baseline") as helpers:
        helpers.start(QUESTIONS)
        running = list(helpers._started)
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in running) and time.monotonic() - started < 10


def test_a_worker_ends_with_its_parent():
    """A killed notebook must not leave a process on the second GPU."""
    code = "from utils.evaluation.workers import end_with_parent; import time; end_with_parent(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=workers.ROOT)
    process.stdin.close()
    assert process.wait(timeout=20) == 1


def test_without_a_second_gpu_one_process_does_everything(tmp_path):
    helpers = Workers(open_run("demo", tmp_path), "baseline")
    assert helpers.count == 1 and len(helpers.start(QUESTIONS)) == 9
