"""An earlier session's run directory, found in both of Kaggle's mount layouts and copied, never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.errors import RunDirError
from utils.files import write_json
from utils.kaggle import attach as inputs
from utils.kaggle.attach import adopt_attached, find_attached
from utils.pipeline.state import SeriesState, write_state

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


def test_somebody_elses_manifest_and_a_large_collection_are_passed_over(tmp_path, monkeypatch):
    (tmp_path / "datasets/bob/webapp").mkdir(parents=True)
    (tmp_path / "datasets/bob/webapp/manifest.json").write_text('{"name": "an app"}')
    monkeypatch.setattr(inputs, "WIDTH", 50)
    images = tmp_path / "datasets/bob/xrays"
    images.mkdir()
    for number in range(60):
        (images / f"{number}.png").touch()
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
    monkeypatch.setattr(inputs, "KAGGLE", tmp_path)
    monkeypatch.setattr(inputs, "runs_dir", lambda: tmp_path / "working" / "runs")
    (tmp_path / "working").mkdir()
    target = adopt_attached()
    assert target == tmp_path / "working" / "runs" / "t4"
    assert (target / "data" / "train.parquet").read_bytes() == b"rows" and not (target / "state.json").exists()
    assert all(path.stat().st_mode & 0o200 for path in (target, target / "data", target / "data" / "train.parquet"))
    assert "going on with" in capsys.readouterr().out
    assert adopt_attached() == target and "going on" not in capsys.readouterr().out  # once


def test_a_run_directory_that_has_a_manifest_is_left_alone(tmp_path):
    attach(tmp_path / "input", TODAY)
    own = attach(tmp_path, "own", note="mine")
    assert adopt_attached("t4", own, tmp_path / "input") == own
    assert (own / "manifest.json").read_text().count("mine") == 1


def test_without_anything_attached_the_default_is_below_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert adopt_attached("demo", "", tmp_path / "input") == tmp_path / "runs" / "demo"
    assert not (tmp_path / "runs").exists()
