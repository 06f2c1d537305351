"""The driver's bookkeeping, with notebooks replaced by stages that only write their files."""

from __future__ import annotations

import io
import os
import signal

import pytest
from rich.console import Console

from utils.errors import StageOrderError
from utils.files import write_text
from utils.pipeline import runner as series
from utils.pipeline.run_dir import read_manifest
from utils.pipeline.stage import open_stage
from utils.pipeline.state import read_state


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the stages that ran; 00 pins a commit, as it does for a model from the Hub."""
    names: list[str] = []

    def run_stage(run, stage, console, kernels):
        names.append(stage.number)
        opened = open_stage(stage.name, run.config.profile, run.path, run.overrides)
        if stage.number == "00":
            opened.pin("data.revision", "abc")
        for output in stage.outputs:
            write_text(opened.file(output if "." in output else f"{output}/part.txt"), '{"sentence": "s"}')
        opened.finish()

    monkeypatch.setattr(series, "run_stage", run_stage)
    monkeypatch.setattr(series, "write_report", lambda run: None)
    return names


def go(path, fresh=False, first="00", **overrides):
    return series.run_series("demo", path, overrides, first, fresh=fresh, console=Console(file=io.StringIO()))


def test_a_commit_that_00_pinned_outlives_the_run_and_makes_nothing_stale(ran, tmp_path):
    assert go(tmp_path).config.data.revision == "abc"
    assert read_manifest(tmp_path)["overrides"]["data.revision"] == "abc"
    assert len(ran) == 6
    go(tmp_path)
    assert len(ran) == 6


def test_fresh_runs_everything_again_and_starts_from_no_answer_checkpoint_or_registration(ran, tmp_path):
    go(tmp_path)
    write_text(tmp_path / "training/checkpoints/part.txt", "hours of work")
    go(tmp_path, fresh=True)
    assert len(ran) == 12
    assert (tmp_path / "training/checkpoints.old/part.txt").read_text() == "hours of work"
    assert (tmp_path / "baseline/answers.jsonl.old").exists() and (tmp_path / "data/registration.json.old").exists()


def test_fresh_from_a_stage_on_leaves_what_earlier_ones_rest_on(ran, tmp_path):
    go(tmp_path)
    write_text(tmp_path / "training/checkpoints/part.txt", "hours of work")
    go(tmp_path, fresh=True, first="03", **{"data.revision": "abc"})
    assert ran[6:] == ["03", "04", "05"] and (tmp_path / "training/checkpoints.old/part.txt").exists()
    assert not list(tmp_path.glob("data/*.old")) and not list(tmp_path.glob("baseline/*.old"))
    with pytest.raises(StageOrderError, match="its settings changed"):  # before anything is moved
        go(tmp_path, fresh=True, first="04", **{"data.seed": 5})
    assert (tmp_path / "tuned/answers.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["_set_aside", "require_ancestors", "write_state", "_run_stages", "summarise"])
def test_asked_to_stop_between_two_stages_it_says_how_to_go_on(ran, tmp_path, monkeypatch, place, number):
    real, asked = getattr(series, place), []

    def with_a_signal(*arguments):
        if not asked:
            asked.append(number)
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(series, place, with_a_signal)
    with pytest.raises(series.SeriesInterrupted, match=r"^stopped by .*; what was saved stays$") as told:
        go(tmp_path, fresh=True)
    assert told.value.status == 128 + number and told.value.continue_with.endswith("--from 00")
    state = read_state(tmp_path)
    assert (state.state, state.kind) == ("continue", "Interrupted")
    assert go(tmp_path) and read_state(tmp_path).state == "done"


def test_asked_to_stop_while_a_failure_is_put_on_file_it_is_still_put_there(ran, tmp_path, monkeypatch):
    real, written = series.write_state, []

    def fail(run, stage, *_):
        raise series.SeriesFailed(run, stage, "out of ideas", "ValueError")

    def with_a_signal(path, state):
        written.append(state.state)
        if written == ["running", "failed"]:
            os.kill(os.getpid(), signal.SIGTERM)
        real(path, state)

    monkeypatch.setattr(series, "run_stage", fail)
    monkeypatch.setattr(series, "write_state", with_a_signal)
    with pytest.raises(series.SeriesFailed, match="out of ideas"):
        go(tmp_path)
    assert read_state(tmp_path).state == "failed" and read_state(tmp_path).sentence == "out of ideas"
