"""A stage is opened only where it can be run, and done only when it wrote what it promised."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.staged import complete, snapshot, write_outputs
from utils import hardware as platforms
from utils.errors import ConfigError, HardwareError, RunDirError
from utils.pipeline import stage as stages_start
from utils.pipeline.run_dir import open_run
from utils.pipeline.stage import open_stage
from utils.pipeline.stages import BY_NAME, STAGES, find_stage
from utils.project import ROOT

NEEDY = [(stage.name, stage.needs[0]) for stage in STAGES if stage.needs]


def test_a_stage_that_wrote_not_all_of_its_outputs_is_not_done(tmp_path):
    run = open_stage("00_setup", "demo", tmp_path)
    write_outputs(run)
    run.file("data/split.json").unlink()
    with pytest.raises(RunDirError, match=r"00_setup did not write data/split.json; run all of its cells"):
        run.finish()
    assert run.stale_because(run.stage) == "it was interrupted"


@pytest.mark.parametrize(("name", "needed"), NEEDY)
def test_a_stage_before_the_one_that_it_needs_is_refused_with_the_notebook_to_run(tmp_path, name, needed):
    complete(tmp_path, STAGES[STAGES.index(BY_NAME[needed]) - 1].number) if needed != "00_setup" else None
    with pytest.raises(RunDirError, match=f"{name} needs {needed}, but it has not run .*notebooks/{needed}.ipynb"):
        open_stage(name, "demo", tmp_path)


def test_a_stage_is_refused_where_what_its_needs_rest_on_is_out_of_date(tmp_path):
    """Training on the rows of an earlier split, recorded as those of the new one, would be a lie."""
    complete(tmp_path)
    before = snapshot(tmp_path)
    for name, overrides in (("03_lora_training", {"data.train_rows": 100}), ("05_export", {"lora.r": 8})):
        with pytest.raises(RunDirError, match=f"{name} needs .*, but its settings changed"):
            open_stage(name, "demo", tmp_path, overrides)
    assert snapshot(tmp_path) == before


def test_the_comparison_is_refused_where_the_baseline_was_answered_under_other_conditions(tmp_path):
    run = complete(tmp_path, "03")
    asked = BY_NAME["01_baseline_inference"]
    record = run.record(asked)
    run.write_record(asked, **{**record, "computed_on": {**record["computed_on"], "dtype": "bfloat16"}})
    with pytest.raises(
        RunDirError, match="answered on cpu, transformers, bfloat16, this is cpu, transformers, float32"
    ):
        open_stage("04_comparison", "demo", tmp_path)


def test_a_commit_that_was_found_out_is_kept_for_every_later_stage(tmp_path):
    run = open_stage("00_setup", "demo", tmp_path)
    run.pin("model.revision", "abc")
    run.pin("data.revision", None)
    write_outputs(run)
    run.finish()
    assert open_run("auto", tmp_path).config.model.revision == "abc"
    assert open_stage("02_dataset_formatting", "demo", tmp_path).config.data.revision is None


def test_a_stage_after_one_that_was_interrupted_is_refused(tmp_path):
    open_stage("00_setup", "demo", tmp_path)
    with pytest.raises(RunDirError, match=r"02_dataset_formatting needs 00_setup, but it was interrupted"):
        open_stage("02_dataset_formatting", "demo", tmp_path)


@pytest.mark.parametrize(
    ("error", "stage", "profile", "overrides"),
    [
        (ConfigError, "03", "demo", {"train.max_step": 3}),
        (ConfigError, "03", "demo", {"train.max_steps": "x"}),
        (ConfigError, "03", "demo", "train.max_steps=3"),
        (RunDirError, "03", "tutorial", {}),
        (RunDirError, "03", "demo", {"model.max_seq_length": 64}),
        (HardwareError, "03", "demo", {"hardware.device": "cuda"}),
        (HardwareError, "00", "demo", {"hardware.min_disk_gib": 1e9}),
    ],
    ids=["unknown-key", "wrong-type", "no-mapping", "other-profile", "stage-order", "no-gpu", "little-disk"],
)
def test_an_open_that_is_refused_leaves_everything_as_it_was(tmp_path, monkeypatch, error, stage, profile, overrides):
    complete(tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    with pytest.raises(error):
        open_stage(find_stage(stage).name, profile, tmp_path, overrides)
    after = snapshot(tmp_path)
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] != before[name]] == []


def test_after_a_missing_gpu_the_advised_demo_opens_in_the_same_place(tmp_path, monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    with pytest.raises(HardwareError, match="or take the profile demo"):
        open_stage("00_setup", "t4", tmp_path / "run")
    assert open_stage("00_setup", "demo", tmp_path / "run").config.profile == "demo"


def test_a_notebook_whose_opening_was_refused_keeps_nobody_out(tmp_path):
    code = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="nocolor")
shell.run_cell("from utils.pipeline.stage import open_stage")
for _ in range(2):
    shell.run_cell("open_stage('03_lora_training', 'demo', {str(tmp_path)!r})")
from utils.pipeline import lock
print(lock._held)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "RunDirError" in done.stdout and done.stdout.endswith("\n{}\n"), done.stdout


def test_on_drive_the_large_files_room_is_looked_for_on_the_machine(tmp_path, monkeypatch):
    """Free Drive has 15 GB; weights are written to scratch there."""
    asked = {}
    monkeypatch.setattr(stages_start.hardware, "require_disk", lambda path, gib, what: asked.update({what: path}))
    monkeypatch.setattr(stages_start, "DRIVE", tmp_path / "drive")
    for place in ("drive", "elsewhere"):
        stages_start.require_hardware(open_run("demo", tmp_path / place / "run"), BY_NAME["00_setup"])
        wanted = Path(tempfile.gettempdir()) if place == "drive" else tmp_path / place / "run"
        assert asked["The profile demo"] == wanted
