"""A run that takes two sessions is the run that one session makes, bit for bit."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.conftest import SETTINGS
from tests.loopback import KaggleServer, series_cli
from tests.sessions import Machine

REFERENCE = "alice/deepseek-r1-medical-lora"
SHORT = 0.008  # hours, of which a tenth is kept in reserve


def work(server: KaggleServer, root: Path, model: Path) -> None:
    """What Kaggle does with the newest version: a new machine, with the last output attached where it is asked for."""
    machine, version = Machine(root, model), server.versions[-1]
    if version.get("kernelDataSources"):
        machine.attach(server.files, "notebooks/alice/deepseek-r1-medical-lora")
    machine.hand_output_to(server, machine.execute(version["text"]))


def test_a_session_that_ends_early_is_resumed_by_the_next_one(pushed, kaggle_server, embedded_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("c")  # short: a kernel's socket lies below
    home = root / "home"
    home.mkdir()
    first = series_cli(kaggle_server, home, "push", *SETTINGS, "--set", f"hardware.max_hours={SHORT}")
    assert first.returncode == 0, first.stderr
    work(kaggle_server, root / "one", embedded_model)
    ended = series_cli(kaggle_server, home, "collect", "--wait", "--poll", "0.01")
    assert ended.returncode == 4 and "to be continued at" in ended.stdout, ended.stdout + ended.stderr

    again = series_cli(kaggle_server, home, "push", "--continue", "--set", "hardware.max_hours=9")
    assert again.returncode == 0, again.stderr
    assert kaggle_server.versions[-1]["kernelDataSources"] == [REFERENCE]
    work(kaggle_server, root / "two", embedded_model)
    done = series_cli(kaggle_server, home, "collect", "--wait", "--poll", "0.01")
    assert done.returncode == 0, done.stdout + done.stderr + kaggle_server.log[-3000:]
    assert kaggle_server.log.count("unchanged, not run again") >= 1
    collected = home / "runs" / "kaggle-deepseek-r1-medical-lora"
    for name in ("export/adapter/adapter_model.safetensors", "comparison/metrics.json", "baseline/answers.jsonl"):
        assert (collected / name).read_bytes() == (pushed.run / name).read_bytes(), name
