"""An earlier session's run directory, found in both of Kaggle's mount layouts; and how a session ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils import hardware, project
from utils.errors import RunDirError
from utils.files import write_json
from utils.kaggle import attach as kaggle_attach
from utils.kaggle.attach import UserError, find_attached, finish_session, resume_from_attached
from utils.pipeline.run_dir import SeriesState, read_state, write_state

TODAY = "notebooks/alice/deepseek-r1-medical-lora/runs/t4"
OLDER = "deepseek-r1-medical-lora/runs/t4"
DATASET = "datasets/alice/my-run"


def attach(root: Path, place: str, profile: str = "t4", note: str = "") -> Path:
    run = root / place
    (run / "data").mkdir(parents=True)
    (run / "data" / "train.parquet").write_bytes(b"rows")
    write_json(run / "manifest.json", {"profile": profile, "note": note, "stages": {}})
    write_state(run, SeriesState(state="continue", stage="03_lora_training"))
    return run


@pytest.mark.parametrize("place", [TODAY, OLDER, DATASET])
def test_a_run_is_found_in_todays_and_in_the_older_layout(tmp_path, place):
    run = attach(tmp_path, place)
    assert find_attached("t4", tmp_path) == run
    assert find_attached("auto", tmp_path) == run


def test_nothing_attached_is_none_and_so_is_another_profile(tmp_path):
    assert find_attached("t4", tmp_path) is None and find_attached("t4", tmp_path / "not there") is None
    attach(tmp_path, TODAY, profile="full")
    assert find_attached("t4", tmp_path) is None


def test_one_output_mounted_twice_is_one_run_and_two_different_ones_are_named(tmp_path):
    attach(tmp_path, TODAY)
    attach(tmp_path, OLDER)
    assert find_attached("t4", tmp_path) is not None
    attach(tmp_path, "notebooks/alice/another/runs/t4", note="another")
    with pytest.raises(RunDirError, match="2 different runs are attached") as caught:
        find_attached("t4", tmp_path)
    assert TODAY in str(caught.value) or OLDER in str(caught.value)


def test_somebody_elses_manifest_is_passed_over(tmp_path):
    (tmp_path / "datasets/bob/webapp").mkdir(parents=True)
    (tmp_path / "datasets/bob/webapp/manifest.json").write_text('{"name": "an app"}')
    run = attach(tmp_path, TODAY)
    assert find_attached("t4", tmp_path) == run


def test_a_damaged_run_is_told_rather_than_passed_over(tmp_path):
    run = attach(tmp_path, TODAY)
    (run / "manifest.json").write_text((run / "manifest.json").read_text()[:-5])
    with pytest.raises(RunDirError, match=r"manifest.json cannot be read"):
        find_attached("auto", tmp_path)


def test_the_run_is_copied_whole_without_the_other_sessions_state(tmp_path, monkeypatch, capsys):
    attached = attach(tmp_path / "input", TODAY)
    for path in (attached, attached / "data"):
        path.chmod(0o555)  # attached inputs cannot be written to
    monkeypatch.setattr(kaggle_attach, "KAGGLE", tmp_path)
    monkeypatch.setattr(kaggle_attach, "runs_dir", lambda: tmp_path / "working" / "runs")
    (tmp_path / "working").mkdir()
    target = resume_from_attached()
    assert target == tmp_path / "working" / "runs" / "t4"
    assert (target / "data" / "train.parquet").read_bytes() == b"rows" and not (target / "state.json").exists()
    assert all(path.stat().st_mode & 0o200 for path in (target, target / "data", target / "data" / "train.parquet"))
    assert "resuming " in capsys.readouterr().out
    assert resume_from_attached() == target and "resuming" not in capsys.readouterr().out  # once


def test_a_run_directory_that_has_a_manifest_is_left_alone(tmp_path):
    attach(tmp_path / "input", TODAY)
    own = attach(tmp_path, "own", note="mine")
    assert resume_from_attached("t4", own, tmp_path / "input") == own
    assert (own / "manifest.json").read_text().count("mine") == 1


def test_without_anything_attached_the_default_is_below_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resume_from_attached("demo", "", tmp_path / "input") == tmp_path / "runs" / "demo"
    assert not (tmp_path / "runs").exists()


def test_a_single_notebook_works_on_drive_where_it_is_mounted(tmp_path, monkeypatch):
    monkeypatch.setattr(project, "DRIVE", tmp_path)
    assert resume_from_attached("demo", "", tmp_path / "input") == tmp_path / project.NAME / "runs" / "demo"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory in /kaggle/working, moved below tmp_path."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    for module in (kaggle_attach, hardware):
        monkeypatch.setattr(module, "KAGGLE", tmp_path / "kaggle")
    path = tmp_path / "kaggle" / "working" / "runs" / "t4"
    for name in ("export/adapter/adapter_model.safetensors", "export/merged/model.safetensors", "export/merged/config.json",
                 "training/checkpoints/abc/checkpoint-50/optimizer.pt", "training/adapter/adapter_model.safetensors"):  # fmt: skip
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x" * 2000)
    write_json(path / "manifest.json", {"profile": "t4", "overrides": {}, "stages": {}})
    return path


def test_on_kaggle_a_run_that_is_done_loses_its_checkpoints_and_nothing_else(run, monkeypatch):
    write_state(run, SeriesState(state="done"))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(kaggle_attach, "where", lambda: "local")
        finish_session(run)
    assert (run / "training/checkpoints").exists()
    assert finish_session(run).state == "done" and not (run / "training/checkpoints").exists()
    assert (run / "training/adapter").exists() and (run / "export/merged/model.safetensors").exists()


def test_a_run_to_be_continued_keeps_its_checkpoints(run):
    write_state(run, SeriesState(state="continue", stage="03_lora_training", sentence="8.0 h old"))
    assert finish_session(run).state == "continue"
    assert (run / "training/checkpoints/abc/checkpoint-50/optimizer.pt").exists()


def test_a_series_that_failed_stops_the_notebook_with_its_sentence(run):
    write_state(
        run,
        SeriesState(state="failed", stage="03_lora_training", kind="TrainingError", sentence="Loss was not finite."),
    )
    with pytest.raises(UserError, match=r"03_lora_training failed: Loss was not finite\. What finished is kept"):
        finish_session(run)


def test_a_series_that_died_without_a_word_is_recorded_as_killed(run):
    write_state(run, SeriesState(state="running"))
    with pytest.raises(UserError, match="it died, most often because memory ran out"):
        finish_session(run)
    assert (read_state(run).state, read_state(run).kind) == ("failed", "killed")


def test_a_second_run_that_was_refused_does_not_show_how_the_first_one_ended(run):
    write_state(run, SeriesState(state="done"))
    assert resume_from_attached("t4", run) == run and read_state(run) is None
    with pytest.raises(UserError, match="it never began; what it printed says why"):
        finish_session(run)
    assert (run / "training/checkpoints").exists()


def test_a_series_that_never_began_says_so(tmp_path):
    with pytest.raises(UserError, match="it never began"):
        finish_session(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
