"""Tracking: offline without a key, and whatever wandb does, the stage goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pandas as pd
import pytest

from tests import fake_tokens
from utils.pipeline.stage import StageRun, open_stage
from utils.project import python_path
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


_IN_A_PROCESS_OF_ITS_OWN = """
import sys, time
import pandas as pd
from pathlib import Path
from utils.pipeline.stage import open_stage
from utils.report.tracking import Tracker

run = open_stage("00_setup", "demo", sys.argv[1], {"tracking.mode": "auto"})
started = time.monotonic()
tracker = Tracker(run, "setup")
print("SECONDS", time.monotonic() - started)
tracker.log({"a_loss_of_ours": 1.5}, step=1)
tracker.table("metrics", pd.DataFrame({"a": [1]}))
tracker.image("loss", Path("there is no such picture.png"))
tracker.log({"not_logged_any_more": 1.5}, step=2)
tracker.finish()
"""


def test_a_key_that_looks_right_and_no_network_lead_offline_within_30_seconds(tmp_path):
    """The real wandb, which by itself would try for 90 s and then raise. The key stays out of all that is written, and
    what was logged before a trouble is kept."""
    pytest.importorskip("wandb")
    key = fake_tokens.wandb("tracking")
    nobody = {
        "WANDB_API_KEY": key,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "HOME": str(tmp_path),
        "PYTHONPATH": python_path(),
    }
    command = [sys.executable, "-c", _IN_A_PROCESS_OF_ITS_OWN, str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | nobody, capture_output=True, text=True, check=True, timeout=120
    )
    said = done.stdout + done.stderr
    assert float(done.stdout.split("SECONDS ")[1].split()[0]) < 30
    assert "online tracking failed (CommError)" in said and "tracking: wandb offline, files in" in said
    assert said.count("tracking failed (") == 2 and key not in said  # once online, once for the picture
    (file,) = (tmp_path / "run" / "tracking").glob("wandb/offline-run-*/run-*.wandb")
    assert b"a_loss_of_ours" in (logged := file.read_bytes()) and b"not_logged_any_more" not in logged
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
