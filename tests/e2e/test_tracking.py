"""Tracking without a network: the real wandb, which by itself would try for 90 s and then raise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import fake_tokens
from utils.project import python_path

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
