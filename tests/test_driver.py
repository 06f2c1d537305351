"""The driver's bookkeeping, with notebooks replaced by stages that only write their files."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import time
from functools import partial

import pytest
from papermill.exceptions import PapermillExecutionError
from rich.console import Console

from utils import __main__ as command_line
from utils.errors import HardwareError, RunDirError
from utils.evaluation.questions import Question, register
from utils.files import write_text
from utils.pipeline import runner
from utils.pipeline.run_dir import open_run, read_state
from utils.pipeline.runner import StageEnded
from utils.pipeline.signals import StopRequest
from utils.pipeline.stage import open_stage
from utils.pipeline.stages import BY_NAME, STAGES
from utils.pipeline.time_limit import RESERVE_S, Deadline


def work(run, stage) -> None:
    """What a notebook does: 00 pins a commit, as it does for a model from the Hub, and registers what is measured."""
    opened = open_stage(stage.name, run.config.profile, run.path)
    for output in stage.outputs:
        write_text(opened.file(output if "." in output else f"{output}/part.txt"), '{"sentence": "s"}')
    if stage.number == "00":
        opened.pin("data.revision", "abc")
        opened.file("data/registration.json").unlink()
        register(opened, [Question(id="1", kind="open", prompt="why?")], [str(run.config.data.seed)])
    opened.finish()


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the stages that ran."""
    names: list[str] = []

    def run_stage(run, stage, console, stop):
        names.append(stage.number)
        run.save()
        work(run, stage)

    monkeypatch.setattr(runner, "run_stage", run_stage)
    return names


def go(path, fresh=False, first="00", last="05", **overrides):
    output = io.StringIO()
    runner.run_series("demo", path, overrides, first, last, fresh, Console(file=output, width=300))
    return output.getvalue()


def test_a_commit_that_00_pinned_outlives_the_run_and_makes_nothing_stale(ran, tmp_path):
    go(tmp_path)
    assert open_run("auto", tmp_path).config.data.revision == "abc"
    assert len(ran) == 6
    assert "settings other than" not in go(tmp_path)
    assert len(ran) == 6


def test_a_setting_is_kept_on_which_no_stage_rests(ran, tmp_path):
    go(tmp_path)
    said = go(tmp_path, **{"tracking.mode": "disabled"})
    assert "settings other than the profile's: tracking.mode=disabled (--fresh reads the profile again)" in said
    assert len(ran) == 6 and open_run("auto", tmp_path).config.tracking.mode == "disabled"


def test_fresh_runs_everything_again_and_starts_from_no_answer_checkpoint_or_registration(ran, tmp_path):
    go(tmp_path, **{"lora.r": 8})
    write_text(tmp_path / "training/checkpoints/part.txt", "hours of work")
    write_text(tmp_path / "baseline/answers.1.jsonl", "")  # another process's share
    go(tmp_path, fresh=True)
    assert len(ran) == 12 and open_run("auto", tmp_path).config.lora.r == 16
    assert (tmp_path / "training/checkpoints.old/part.txt").read_text() == "hours of work"
    assert (tmp_path / "baseline/answers.jsonl.old").exists() and (tmp_path / "data/registration.json.old").exists()
    assert [path.name for path in tmp_path.glob("baseline/answers.1*")] == ["answers.1.jsonl.old"]


def test_a_fresh_00_alone_leaves_no_answers_that_would_be_older_than_its_registration(ran, tmp_path):
    """The verdict then said "changed after answers", for ever, though every answer was given anew."""
    go(tmp_path)
    go(tmp_path, fresh=True, last="00", **{"data.seed": 5})
    assert (tmp_path / "baseline/answers.jsonl.old").exists() and not (tmp_path / "tuned/answers.jsonl").exists()
    go(tmp_path)
    assert json.loads((tmp_path / "data/registration.json").read_text())["changed_after_answers"] is False


def test_fresh_from_a_stage_on_leaves_what_earlier_ones_rest_on(ran, tmp_path):
    go(tmp_path)
    write_text(tmp_path / "training/checkpoints/part.txt", "hours of work")
    go(tmp_path, fresh=True, first="03", **{"lora.r": 8})
    assert open_run("auto", tmp_path).config.data.revision == "abc"  # which 00 found out, and nobody gave again
    assert ran[6:] == ["03", "04", "05"] and (tmp_path / "training/checkpoints.old/part.txt").exists()
    assert not list(tmp_path.glob("data/*.old")) and not list(tmp_path.glob("baseline/*.old"))
    with pytest.raises(RunDirError, match="its settings changed"):  # before anything is moved
        go(tmp_path, fresh=True, first="04", **{"data.seed": 5})
    assert (tmp_path / "tuned/answers.jsonl").exists()


def test_fresh_that_is_interrupted_is_fresh_on_resume(ran, tmp_path, monkeypatch):
    """What had not been reached was done on record, and its training counted as current."""
    go(tmp_path)
    real = runner.run_stage

    def fail_in_01(run, stage, *rest):
        if stage.number == "01":
            raise StageEnded("ValueError", "out of ideas")
        real(run, stage, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_stage", fail_in_01)
        with pytest.raises(StageEnded, match="out of ideas"):
            go(tmp_path, fresh=True)
    go(tmp_path, first="01")
    assert ran[6:] == ["00", "01", "02", "03", "04", "05"]


def test_a_stage_is_begun_only_where_it_has_time_left_but_the_first_of_a_session_always(ran, tmp_path, monkeypatch):
    def leave(seconds: float) -> None:
        limit = Deadline(time.time() - 8 * 3600 + RESERVE_S + seconds, 8)
        monkeypatch.setattr(Deadline, "of", classmethod(lambda cls, max_hours: limit))

    go(tmp_path, last="03")
    run, asked = open_run("auto", tmp_path), BY_NAME["01_baseline_inference"]
    run.write_record(asked, **run.record(asked) | {"seconds": 2400.0})
    leave(1700)
    with pytest.raises(StageEnded, match="04 is begun only where 30 min are left") as ended:
        go(tmp_path, **{"train.seed": 4})
    assert ended.value.exit_code == 4 and ran[-1] == "03"
    leave(100)
    go(tmp_path)
    assert ran[-2:] == ["04", "05"]  # nobody knows how long 05 takes


def test_a_stage_that_resumes_is_begun_for_half_an_hour_and_one_that_cannot_for_all_of_it(ran, tmp_path):
    go(tmp_path)
    run = open_run("auto", tmp_path)
    for stage in STAGES:
        run.write_record(stage, **run.record(stage) | {"seconds": 7000.0})
    assert {stage.number: runner.seconds_to_begin(run, stage) for stage in STAGES} == {
        "00": 1800, "01": 1800, "02": 7000, "03": 1800, "04": 1800, "05": 7000,
    }  # fmt: skip


def test_where_the_hardware_is_missing_the_line_to_resume_by_keeps_the_settings(tmp_path, monkeypatch):
    def lacks(*_):
        raise HardwareError("no GPU")

    monkeypatch.setattr(runner, "require_hardware", lacks)
    with pytest.raises(RunDirError):
        go(tmp_path / "refused", first="03", **{"train.max_steps": 10})
    assert not (tmp_path / "refused/config.yaml").exists()
    with pytest.raises(StageEnded, match="no GPU") as ended:
        go(tmp_path / "my runs", **{"train.max_steps": 10})
    words = shlex.split(ended.value.resume)
    run = open_run(words[words.index("--profile") + 1], words[words.index("--run-dir") + 1])
    assert run.path == tmp_path / "my runs" and run.config.train.max_steps == 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["_move_aside", "require_ancestors", "write_state", "run_stage"])
def test_asked_to_stop_between_two_stages_it_says_how_to_resume(ran, tmp_path, monkeypatch, place, number):
    go(tmp_path, last="00")
    real, asked = getattr(runner, place), []

    def with_a_signal(*arguments):
        if not asked:
            asked.append(number)
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(runner, place, with_a_signal)
    with pytest.raises(StageEnded, match=r"^stopped by .*; what was saved stays$") as ended:
        go(tmp_path, fresh=True)
    assert ended.value.exit_code == 128 + number
    assert ended.value.resume.endswith(f"--from {'01' if place == 'run_stage' else '00'}")
    state = read_state(tmp_path)
    assert (state.state, state.kind) == ("continue", "Interrupted")
    go(tmp_path)
    assert read_state(tmp_path).state == "done" and ran[1:] == ["00", "01", "02", "03", "04", "05"]


def test_asked_again_some_seconds_later_it_stops_at_once(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "StopRequest", partial(StopRequest, patience_s=0.0))

    def asked_twice(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner, "run_stage", asked_twice)
    with pytest.raises(StageEnded, match="stopped at once; what was saved stays") as ended:
        go(tmp_path)
    assert ended.value.exit_code == 143


def cell_error(name: str, sentence: str) -> PapermillExecutionError:
    return PapermillExecutionError(3, 3, "train()", name, sentence, [])


@pytest.mark.parametrize(
    ("error", "state", "kind", "exit_code", "sentence"),
    [
        (cell_error("DataError", "no rows"), "failed", "DataError", 1, "no rows"),
        (cell_error("ValueError", "x"), "failed", "ValueError", 1, "ValueError: x (the executed notebook shows where)"),
        (cell_error("SessionOver", "8 h"), "continue", "SessionOver", 4, "8 h"),
        (cell_error("Interrupted", "asked"), "continue", "Interrupted", 130, "asked"),
        (
            RuntimeError("Kernel died before replying"),
            "failed",
            "killed",
            1,
            "its kernel died, most often because memory",
        ),
        (OSError(28, "No space left on device"), "failed", "OSError", 1, "[Errno 28] No space left on device"),
    ],
    ids=["user", "unknown", "time", "signal", "killed", "disk"],
)
def test_how_a_stage_ended_is_told_and_on_file(tmp_path, monkeypatch, error, state, kind, exit_code, sentence):
    def fail(*_):
        raise error

    monkeypatch.setattr(runner, "run_stage", fail)
    with pytest.raises(StageEnded) as ended:
        go(tmp_path)
    assert str(ended.value).startswith(sentence) and (ended.value.kind, ended.value.exit_code) == (kind, exit_code)
    on_file = read_state(tmp_path)
    assert (on_file.state, on_file.kind, on_file.stage) == (state, kind, "00_setup")
    assert on_file.sentence == str(ended.value)


def test_asked_to_stop_while_a_failure_is_put_on_file_it_is_still_put_there(ran, tmp_path, monkeypatch):
    real, written = runner.write_state, []

    def fail(run, stage, *_):
        raise StageEnded("ValueError", "out of ideas")

    def with_a_signal(path, state):
        written.append(state.state)
        if written == ["running", "failed"]:
            os.kill(os.getpid(), signal.SIGTERM)
        real(path, state)

    monkeypatch.setattr(runner, "run_stage", fail)
    monkeypatch.setattr(runner, "write_state", with_a_signal)
    with pytest.raises(StageEnded, match="out of ideas"):
        go(tmp_path)
    assert read_state(tmp_path).state == "failed" and read_state(tmp_path).sentence == "out of ideas"


def test_a_report_that_cannot_be_written_is_a_sentence_and_the_run_has_passed(ran, tmp_path, monkeypatch, capsys):
    """nbconvert without its templates ended six stages that had passed in a traceback."""

    def no_template(run):
        raise ValueError("No template sub-directory with name 'basic' found")

    monkeypatch.setattr("utils.report.index.write_report", no_template)
    monkeypatch.setattr(command_line, "console", Console(width=500, file=(output := io.StringIO())))
    command_line.run(profile="demo", run_dir=str(tmp_path))  # typer.Exit would be raised here
    assert "The report could not be written (ValueError: No template sub-directory" in output.getvalue()
    assert len(ran) == 6 and read_state(tmp_path).state == "done"
