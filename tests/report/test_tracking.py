"""Tracking: offline without a key, and whatever wandb does, the stage goes on."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pandas as pd
import pytest

from utils.pipeline.stage import StageRun, open_stage
from utils.report.tracking import Tracker

KEY = "a-wandb-key-of-ours"


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No login of this machine is seen, and what wandb is told by the environment is put back."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_API_KEY", "wandb"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("kaggle_secrets", "google.colab"):
        monkeypatch.setitem(sys.modules, name, None)


def stage(tmp_path, **tracking) -> StageRun:
    overrides = {f"tracking.{key}": value for key, value in tracking.items()}
    return open_stage("00_setup", "demo", tmp_path / "run", {"tracking.mode": "auto", **(overrides or {})})


def use(tracker: Tracker, tmp_path) -> None:
    """Call everything that a notebook calls."""
    tracker.log({"loss": 1.5}, step=1)
    tracker.table("metrics", pd.DataFrame({"a": [1]}))
    tracker.image("loss", tmp_path / "loss.png")
    tracker.finish()


class FakeRun:
    def __init__(self, error: Exception | None = None):
        self.logged, self.finished, self.error = [], False, error

    def log(self, values, step=None):
        if self.error:
            raise self.error
        self.logged.append((values, step))

    def finish(self):
        self.finished = True


def fake_wandb(monkeypatch, run: FakeRun, refused: tuple[str, ...] = ()) -> list[str]:
    """A wandb whose `init` fails in the `refused` modes; returns the list of modes that it was asked for."""
    asked = []

    def init(mode: str, **_):
        asked.append(mode)
        if mode in refused:
            raise ConnectionError(f"cannot reach the server with {KEY}")
        return run

    module = ModuleType("wandb")
    module.init, module.Settings = init, dict
    module.Table = module.Image = lambda *_, **__: "media"
    monkeypatch.setitem(sys.modules, "wandb", module)
    return asked


def test_tracking_that_is_disabled_does_nothing(tmp_path, monkeypatch, capsys):
    asked = fake_wandb(monkeypatch, FakeRun())
    run = stage(tmp_path, mode="disabled")
    tracker = Tracker(run, "setup")
    use(tracker, tmp_path)
    assert (tracker.mode, asked, capsys.readouterr().out) == ("disabled", [], "")
    assert not run.file("tracking").exists()


def test_without_wandb_the_stage_goes_on_and_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Tracker(stage(tmp_path), "setup")
    use(tracker, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert tracker.mode == "disabled"
    assert [line for line in lines if "failed" in line] == [
        "offline tracking failed (ModuleNotFoundError); the run goes on without it."
    ]


def test_an_init_that_fails_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    fake_wandb(monkeypatch, FakeRun(), refused=("offline",))
    tracker = Tracker(stage(tmp_path, mode="offline"), "setup")
    use(tracker, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert tracker.mode == "disabled"
    assert [line for line in lines if "failed" in line] == [
        "offline tracking failed (ConnectionError); the run goes on without it."
    ]


def test_without_a_key_tracking_is_offline_and_with_one_online(tmp_path, monkeypatch):
    asked = fake_wandb(monkeypatch, FakeRun())
    assert Tracker(stage(tmp_path), "setup").mode == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert Tracker(stage(tmp_path), "setup").mode == "online"
    assert Tracker(stage(tmp_path, mode="offline"), "setup").mode == "offline"
    assert asked == ["offline", "online", "offline"]


def test_a_server_that_cannot_be_reached_leads_offline_and_the_key_is_not_shown(tmp_path, monkeypatch, capsys):
    wandb_run = FakeRun()
    asked = fake_wandb(monkeypatch, wandb_run, refused=("online",))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = Tracker(stage(tmp_path), "setup")
    use(tracker, tmp_path)
    assert (tracker.mode, asked) == ("offline", ["online", "offline"])
    assert wandb_run.finished and wandb_run.logged[0] == ({"loss": 1.5}, 1)
    assert KEY not in capsys.readouterr().out


def test_trouble_while_logging_is_told_once_and_tracking_is_off_from_then_on(tmp_path, monkeypatch, capsys):
    fake_wandb(monkeypatch, FakeRun(OSError("No space left on device")))
    tracker = Tracker(stage(tmp_path), "setup")
    capsys.readouterr()
    use(tracker, tmp_path)
    assert capsys.readouterr().out == "tracking failed (OSError); the run goes on without it.\n"


def test_an_offline_run_leaves_its_files_below_the_run_directory(tmp_path, capsys):
    pytest.importorskip("wandb")
    run = stage(tmp_path, mode="offline")
    tracker = Tracker(run, "setup")
    tracker.log({"loss": 1.5}, step=1)
    tracker.table("metrics", pd.DataFrame({"a": [1]}))
    tracker.finish()
    (file,) = run.file("tracking").glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0
    assert f"tracking: wandb offline, files in {run.file('tracking') / 'wandb'}" in capsys.readouterr().out
