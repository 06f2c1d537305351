"""Longer than one session: what is pushed after what, and when it stops."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tests.kaggle.test_collect import serve, write_run
from tests.loopback import Answer, series_call
from utils.errors import ServiceError
from utils.files import write_lines
from utils.kaggle.push import Submission, push_until_done
from utils.pipeline.runner import count_saved
from utils.pipeline.stages import BY_NAME

REFERENCE = "alice/deepseek-r1-medical-lora"


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_continue_attaches_the_last_output_and_keeps_the_runs_own_profile(kaggle_server, home, tmp_path):
    run = write_run(tmp_path / "run", "continue", stage="03_lora_training", steps=50)
    serve(kaggle_server, run)
    done = series_call(kaggle_server, home, "push", "--continue")
    assert done.returncode == 0, done.stderr
    (body,) = kaggle_server.versions
    assert body["kernelDataSources"] == [REFERENCE]
    assert 'PROFILE = "auto"' in body["text"].replace('\\"', '"')  # the attached run knows its own


@pytest.mark.parametrize("state", ["failed", "running"])
def test_a_session_that_failed_or_was_cut_off_is_resumed_by_what_it_kept(kaggle_server, home, tmp_path, state):
    serve(kaggle_server, write_run(tmp_path / "run", state, stage="03_lora_training"))
    done = series_call(kaggle_server, home, "push", "--continue")
    assert done.returncode == 0, done.stderr
    assert kaggle_server.versions[0]["kernelDataSources"] == [REFERENCE]


@pytest.mark.parametrize("state", ["done", None])
def test_there_has_to_be_something_to_continue(kaggle_server, home, tmp_path, state):
    if state:
        serve(kaggle_server, write_run(tmp_path / "run", state))
    done = series_call(kaggle_server, home, "push", "--continue")
    assert done.returncode == 1 and "nothing to resume; drop --continue" in done.stderr
    assert not kaggle_server.versions


def test_a_source_that_kaggle_does_not_attach_stops_the_chain(kaggle_server, home, tmp_path):
    serve(kaggle_server, write_run(tmp_path / "run", "continue", stage="03_lora_training"))
    kaggle_server.script["SaveKernel"] = [Answer({"versionNumber": 2, "invalidKernelSources": [REFERENCE]})]
    done = series_call(kaggle_server, home, "push", "--continue", "--until-done", "--poll", "0.01")
    assert done.returncode == 1 and f"kernels {REFERENCE}" in done.stderr


class Scripted:
    """A Kaggle whose sessions end as `ends` says: (stage, steps), or None for done."""

    def __init__(self, ends: list, monkeypatch):
        self.ends, self.pushed = iter(ends), []
        monkeypatch.setattr("utils.kaggle.push.push", self._push)
        monkeypatch.setattr("utils.kaggle.push.wait", lambda *_, just_pushed: ("complete", ""))
        monkeypatch.setattr("utils.kaggle.push.peek", self._peek)

    def _push(self, kaggle, request):
        self.pushed.append(request)
        return len(self.pushed), "https://…"

    def _peek(self, kaggle, reference):
        from utils.pipeline.run_dir import SeriesState

        end = next(self.ends)
        if end is None:
            return SeriesState(state="done")
        return SeriesState(state="continue", stage=end[0], steps=end[1], sentence="8 h")


def chain(ends, monkeypatch, sessions=6):
    scripted = Scripted(ends, monkeypatch)
    first = Submission({"id": REFERENCE, "kernel_sources": []}, "")
    state = push_until_done(None, first, Console(quiet=True), sessions)
    return state, [request.metadata["kernel_sources"] for request in scripted.pushed]


def test_sessions_follow_each_other_until_one_is_done(monkeypatch):
    ends = [("03_lora_training", 50), ("03_lora_training", 120), ("04_comparison", 120), None]
    state, pushed = chain(ends, monkeypatch)
    assert state.state == "done" and pushed == [[], *[[REFERENCE]] * 3]


def test_a_run_that_stands_still_is_not_pushed_a_third_time(monkeypatch):
    with pytest.raises(ServiceError, match="Two sessions in a row ended at 03_lora_training with 50 saved"):
        chain([("03_lora_training", 50)] * 9, monkeypatch)


def test_a_series_that_one_session_does_is_collected_at_once(kaggle_server, home, tmp_path):
    serve(kaggle_server, write_run(tmp_path / "run"))
    kaggle_server.statuses = [{"status": s} for s in ("queued", "running", "complete")]
    done = series_call(kaggle_server, home, "push", "--until-done", "--poll", "0.01")
    assert done.returncode == 0 and "the last session ended as done" in done.stdout, done.stderr


def test_there_is_a_limit_to_how_many_sessions_are_started(monkeypatch):
    with pytest.raises(ServiceError, match="not done after 2 sessions; push --continue --until-done for more"):
        chain([("03_lora_training", 50 * n) for n in range(1, 9)], monkeypatch, sessions=2)


def test_the_last_sessions_state_is_read_without_its_other_files(kaggle_server, home, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", "continue", stage="03_lora_training", steps=50)
    serve(kaggle_server, run)
    done = series_call(kaggle_server, home, "push", "--continue", "--dry-run")
    assert done.returncode == 0 and not kaggle_server.versions, done.stderr
    fetched = sorted(Path(call.path).name for call in kaggle_server.calls("/files/"))
    assert fetched == ["manifest.json", "state.json"]
    assert f'kernel_sources: ["{REFERENCE}"]' in done.stdout


def test_answers_on_file_or_the_newest_checkpoint_say_how_far_a_stage_came(tmp_path):
    answers, training = BY_NAME["01_baseline_inference"], BY_NAME["03_lora_training"]
    assert count_saved(tmp_path, answers) == count_saved(tmp_path, training) == 0
    write_lines(tmp_path / "baseline/answers.jsonl", [{"id": "a"}, {"id": "b"}])
    write_lines(tmp_path / "baseline/answers.1.jsonl", [{"id": "c"}])  # another process's share
    assert count_saved(tmp_path, answers) == 3
    for name in ("abc/checkpoint-60", "abc/checkpoint-120", "abc/checkpoint-120.tmp", "def/checkpoint-9"):
        (tmp_path / "training" / "checkpoints" / name).mkdir(parents=True)
    assert count_saved(tmp_path, training) == 120
