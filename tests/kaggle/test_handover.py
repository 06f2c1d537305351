"""The end of a session on Kaggle: what is heavy leaves the output, how it ended is written down."""

from __future__ import annotations

import pytest

from utils import hardware as platforms
from utils.files import write_json
from utils.kaggle import handover
from utils.kaggle.handover import SeriesStopped, hand_over, leave_heavy
from utils.pipeline.state import SeriesState, read_state, write_state


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory in /kaggle/working, moved below tmp_path."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    for module in (handover, platforms):
        monkeypatch.setattr(module, "KAGGLE", tmp_path / "kaggle")
    path = tmp_path / "kaggle" / "working" / "runs" / "t4"
    for name in ("export/adapter/adapter_model.safetensors", "export/merged/model.safetensors", "export/merged/config.json",
                 "training/checkpoints/abc/checkpoint-50/optimizer.pt", "training/adapter/adapter_model.safetensors"):  # fmt: skip
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x" * 2000)
    write_json(path / "manifest.json", {"profile": "t4", "stages": {}})
    return path


TINY = 1e-6  # GiB: every export but the adapter is heavy


def test_a_run_that_is_done_keeps_adapter_and_report_and_leaves_the_rest_in_scratch(run, tmp_path, capsys):
    write_state(run, SeriesState(state="done"))
    state = hand_over(run, TINY)
    assert state.state == "done"
    assert read_state(run).left_in_scratch == {"export/merged": 4000, "training/checkpoints": 2000}
    assert (run / "export/adapter/adapter_model.safetensors").exists() and not (run / "export/merged").exists()
    scratch = tmp_path / "kaggle" / "temp"
    assert sorted(path.name for path in scratch.rglob("*") if path.is_file()) == [
        "config.json",
        "model.safetensors",
        "optimizer.pt",
    ]
    assert "export/merged (0.0 GiB) is in" in capsys.readouterr().out


def test_a_run_to_be_continued_keeps_its_checkpoints(run):
    write_state(run, SeriesState(state="continue", stage="03_lora_training", sentence="8.0 h old"))
    assert hand_over(run, TINY).state == "continue"
    assert (run / "training/checkpoints/abc/checkpoint-50/optimizer.pt").exists()


def test_small_exports_stay(run):
    write_state(run, SeriesState(state="done"))
    hand_over(run)
    assert (run / "export/merged/model.safetensors").exists()


def test_elsewhere_nothing_moves(run, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    monkeypatch.setattr(handover, "where", lambda: "local")
    assert leave_heavy(run, done=True, limit_gib=TINY) == {} and (run / "training/checkpoints").exists()


def test_a_series_that_failed_stops_the_notebook_with_its_sentence(run):
    write_state(
        run,
        SeriesState(state="failed", stage="03_lora_training", kind="TrainingError", sentence="Loss was not finite."),
    )
    with pytest.raises(SeriesStopped, match=r"03_lora_training failed: Loss was not finite\. What finished is kept"):
        hand_over(run)


def test_a_series_that_died_without_a_word_is_recorded_as_killed(run):
    write_state(run, SeriesState(state="running"))
    with pytest.raises(SeriesStopped, match="its process died"):
        hand_over(run)
    assert (read_state(run).state, read_state(run).kind) == ("failed", "killed")


def test_a_series_that_never_began_says_so(tmp_path):
    with pytest.raises(SeriesStopped, match="it never began"):
        hand_over(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_single_notebook_notes_what_it_left_too(run):
    assert set(leave_heavy(run, limit_gib=TINY)) == {"export/merged"}
    assert read_state(run) == SeriesState(state="done", left_in_scratch={"export/merged": 4000})
