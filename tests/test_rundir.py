"""The run directory: who may open it, when a stage is out of date, and that a refusal leaves it as it was."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import yaml

from utils import platforms, rundir
from utils.config import load_config
from utils.errors import ConfigError, HardwareError, RunDirError, StageOrderError
from utils.files import write_json, write_text
from utils.rundir import RunDir, StageRun, altered_files, open_run, open_stage, read_manifest
from utils.settings import Config
from utils.stages import BY_NAME, STAGES, find_stage
from utils.state import SeriesState, write_state
from utils.verification import altered_exports

NEEDY = [(stage.name, stage.needs[0]) for stage in STAGES if stage.needs]


def write_outputs(run: StageRun) -> None:
    """A small file for each output of the stage; an output without a suffix is a folder."""
    for name in run.stage.outputs:
        write_text(run.file(name if Path(name).suffix else f"{name}/part.txt"), f"{name} of {run.stage.name}\n")


def saved(profile: str, path: Path, overrides=None) -> RunDir:
    """A run directory opened and written."""
    run = open_run(profile, path, overrides)
    run.save()
    return run


def complete(path: Path, last: str = "05", **overrides) -> RunDir:
    """A demo run directory in which the stages up to `last` are done."""
    for stage in STAGES[: int(last) + 1]:
        run = open_stage(stage.name, "demo", path, overrides or None)
        write_outputs(run)
        run.finish()
    return open_run("demo", path)


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file below a folder, by content."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def stale(run: RunDir) -> dict[str, str]:
    """{number: reason} of the stages that are not current."""
    reasons = {stage.number: run.stale_because(stage) for stage in STAGES}
    return {number: reason for number, reason in reasons.items() if reason}


def test_a_new_run_directory_holds_its_manifest_and_the_settings_in_force(tmp_path):
    run = saved("demo", tmp_path / "new", {"train.max_steps": 3})
    assert read_manifest(run.path) == {"profile": "demo", "overrides": {"train.max_steps": 3}, "stages": {}}
    stored = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert Config.model_validate(stored) == run.config and run.config.train.max_steps == 3


def test_the_profile_auto_is_the_run_directorys_own(tmp_path):
    saved("tutorial", tmp_path / "run")
    assert open_run("auto", tmp_path / "run").config.profile == "tutorial"


def test_the_profile_auto_of_a_new_run_directory_is_demo_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    assert open_run("auto", tmp_path / "run").config.profile == "demo"


def test_overrides_given_once_persist_and_a_later_one_wins(tmp_path):
    saved("demo", tmp_path, {"train.max_steps": 3, "generate.seed": 1})
    run = saved("demo", tmp_path, {"generate.seed": 2})
    assert (run.config.train.max_steps, run.config.generate.seed) == (3, 2)
    assert open_run("auto", tmp_path).config == run.config


@pytest.mark.parametrize(
    "overrides",
    [
        {"data.path": Path("rows.jsonl")},
        {"lora.target_modules": ("q_proj",)},
        {"lora.target_modules": {"q_proj"}},
        {"train.num_train_epochs": float("inf")},
    ],
    ids=["path", "tuple", "set", "infinity"],
)
def test_overrides_from_a_notebook_are_stored_or_refused_as_a_setting(tmp_path, overrides):
    try:
        run = saved("demo", tmp_path / "run", overrides)
    except ConfigError as error:
        assert next(iter(overrides)) in str(error)
    else:
        assert open_run("auto", tmp_path / "run").config == run.config


def test_a_run_of_all_stages_is_current_and_its_files_are_unaltered(tmp_path):
    run = complete(tmp_path)
    assert stale(run) == {} and altered_files(run.path) == []
    record = run.record(BY_NAME["03_lora_training"])
    assert record["state"] == "done" and "training/log.csv" in record["outputs"]
    assert list(record["inputs"]) == ["data/formatted/part.txt"] and record["seconds"] >= 0
    assert record["versions"]["transformers"] == platforms.installed("transformers")


def test_a_stage_that_wrote_not_all_of_its_outputs_is_not_done(tmp_path):
    run = open_stage("00_setup", "demo", tmp_path)
    write_outputs(run)
    run.file("data/split.json").unlink()
    with pytest.raises(StageOrderError, match=r"00_setup did not write data/split.json; run all of its cells"):
        run.finish()
    assert run.stale_because(run.stage) == "it was interrupted"


@pytest.mark.parametrize(("name", "needed"), NEEDY)
def test_a_stage_before_the_one_that_it_needs_is_refused_with_the_notebook_to_run(tmp_path, name, needed):
    complete(tmp_path, STAGES[STAGES.index(BY_NAME[needed]) - 1].number) if needed != "00_setup" else None
    with pytest.raises(StageOrderError, match=f"{name} needs {needed}, but it has not run .*notebooks/{needed}.ipynb"):
        open_stage(name, "demo", tmp_path)


def test_a_stage_is_refused_where_what_its_needs_rest_on_is_out_of_date(tmp_path):
    """Training on the rows of an earlier split, recorded as those of the new one, would be a lie."""
    complete(tmp_path)
    before = snapshot(tmp_path)
    for name, overrides in (("03_lora_training", {"data.train_rows": 100}), ("05_export", {"lora.r": 8})):
        with pytest.raises(StageOrderError, match=f"{name} needs .*, but its settings changed"):
            open_stage(name, "demo", tmp_path, overrides)
    assert snapshot(tmp_path) == before


def test_the_comparison_is_refused_where_the_baseline_was_answered_under_other_conditions(tmp_path):
    run = complete(tmp_path, "03")
    asked = BY_NAME["01_baseline_inference"]
    record = run.record(asked)
    run.write_record(asked, **{**record, "computed_on": {**record["computed_on"], "dtype": "bfloat16"}})
    with pytest.raises(
        StageOrderError, match="answered on cpu, transformers, bfloat16, this is cpu, transformers, float32"
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
    with pytest.raises(StageOrderError, match=r"02_dataset_formatting needs 00_setup, but it was interrupted"):
        open_stage("02_dataset_formatting", "demo", tmp_path)


def test_an_interrupted_or_failed_stage_is_stale(tmp_path):
    run = complete(tmp_path)
    open_stage("05_export", "demo", tmp_path)
    assert stale(run) == {"05": "it was interrupted"}
    run.write_record(BY_NAME["05_export"], state="failed")
    assert stale(run) == {"05": "it failed"}


@pytest.mark.parametrize(
    ("key", "value", "numbers", "section"),
    [
        ("data.seed", 1, {"00"}, "data"),
        ("generate.max_new_tokens", 8, {"00", "01", "04"}, "generate"),
        ("generate.batch_size", 8, set(), ""),
        ("train.save_steps", 8, set(), ""),
        ("train.loss_on", "all", {"02", "03"}, "train"),
        ("train.max_steps", 0, {"03"}, "train"),
        ("lora.r", 8, {"03"}, "lora"),
        ("evaluate.resamples", 1000, {"04"}, "evaluate"),
        ("export.prompts", 2, {"05"}, "export"),
        ("prompt.style", "tutorial", {"00", "01", "02", "03", "04", "05"}, "prompt"),
        ("tracking.mode", "disabled", set(), ""),
    ],
)
def test_a_changed_setting_makes_those_stages_stale_that_rest_on_it(tmp_path, key, value, numbers, section):
    complete(tmp_path)
    reasons = stale(open_run("demo", tmp_path, {key: value}))
    assert set(reasons) == numbers
    assert all(reason.startswith("its settings changed (") and section in reason for reason in reasons.values())


def test_a_changed_input_makes_the_stages_that_read_it_stale_and_those_after_them_refused(tmp_path):
    run = complete(tmp_path)
    write_text(run.file("data/train.parquet"), "other rows")
    assert stale(run) == {"00": "one of its outputs changed", "02": "one of its inputs changed"}
    with pytest.raises(StageOrderError, match=r"03_lora_training needs 00_setup, but one of its outputs"):
        open_stage("03_lora_training", "demo", tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_text("other"), Path.unlink, lambda p: write_text(p.with_name("new"), "")]
)
def test_a_changed_removed_or_added_output_makes_its_stage_stale(tmp_path, damage):
    run = complete(tmp_path, "03")
    damage(run.file("training/adapter/part.txt"))
    assert stale(run)["03"] == "one of its outputs changed"
    with pytest.raises(StageOrderError, match="04_comparison needs 03_lora_training, but one of its outputs changed"):
        open_stage("04_comparison", "demo", tmp_path)


def test_a_file_that_was_only_touched_makes_nothing_stale(tmp_path):
    run = complete(tmp_path)
    os.utime(run.file("data/train.parquet"), ns=(0, 0))
    assert stale(run) == {}


def test_other_content_in_the_local_data_file_makes_setup_stale(tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_text(rows, "{}")
    run = complete(tmp_path / "run", "00", **{"data.path": str(rows)})
    assert run.stale_because(STAGES[0]) is None
    write_text(rows, "{}\n{}")
    assert run.stale_because(STAGES[0]) == "its settings changed (data file)"


def test_a_changed_notebook_makes_its_stage_stale_but_keeps_its_outputs_usable(tmp_path, monkeypatch):
    run = complete(tmp_path, "00")
    monkeypatch.setattr(rundir, "notebook_digest", lambda stage: "another")
    assert run.stale_because(STAGES[0]) == "its notebook changed"
    assert open_stage("02_dataset_formatting", "demo", tmp_path).stage.name == "02_dataset_formatting"


def test_the_first_stale_stage_is_named_with_its_reason_and_an_edited_notebook_is_passed_over(tmp_path, monkeypatch):
    run = complete(tmp_path, "02")
    assert run.first_stale(STAGES) == (STAGES[3], "it has not run")
    monkeypatch.setattr(rundir, "notebook_digest", lambda stage: "another")
    assert run.first_stale(STAGES[:3]) is None
    write_text(run.file("baseline/nll.parquet"), "other")
    assert run.first_stale(STAGES) == (STAGES[1], "one of its outputs changed")


def test_files_altered_behind_the_manifests_back_are_named_even_with_their_old_time(tmp_path):
    run = complete(tmp_path)
    file = run.file("training/log.csv")
    time = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes().swapcase())
    os.utime(file, ns=(time, time))
    run.file("export/README.md").unlink()
    assert sorted(altered_files(run.path)) == [
        "export/README.md is missing",
        "training/log.csv differs from what was written",
    ]


def test_a_run_directory_of_another_profile_is_refused_with_both_names(tmp_path):
    with pytest.raises(RunDirError, match="holds a run of the profile demo, not tutorial; name another RUN_DIR"):
        open_run("tutorial", complete(tmp_path, "00").path)


@pytest.mark.parametrize(
    "content",
    [b'{"profile": "de', b"", b"[]", b"{}", b"\xff\xfe\x00"],
    ids=["torn", "empty", "list", "no-profile", "bytes"],
)
@pytest.mark.parametrize("opener", [open_run, lambda *a: open_stage("00_setup", *a), lambda *a: read_manifest(a[1])])
def test_a_damaged_manifest_is_refused_and_left_as_it_is(tmp_path, content, opener):
    complete(tmp_path, "00")
    (tmp_path / "manifest.json").write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(RunDirError, match=r"manifest.json cannot be read .*nothing was changed"):
        opener("demo", tmp_path)
    assert snapshot(tmp_path) == before


def test_a_run_directory_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    complete(tmp_path, "00")
    before = snapshot(tmp_path)

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(rundir, "write_json", read_only)
    with pytest.raises(RunDirError, match=r"cannot be written \(Read-only file system\); choose another RUN_DIR."):
        saved("demo", tmp_path, {"train.max_steps": 3})
    assert snapshot(tmp_path) == before


def test_a_run_directory_that_is_a_file_is_a_sentence(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunDirError, match=r"cannot be written \(.*\); choose another RUN_DIR."):
        saved("demo", tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "stage", "profile", "overrides"),
    [
        (ConfigError, "03", "demo", {"train.max_step": 3}),
        (ConfigError, "03", "demo", {"train.max_steps": "x"}),
        (ConfigError, "03", "demo", "train.max_steps=3"),
        (RunDirError, "03", "tutorial", {}),
        (StageOrderError, "03", "demo", {"model.max_seq_length": 64}),
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
    with pytest.raises(HardwareError, match="or run PROFILE = 'demo'"):
        open_stage("00_setup", "t4", tmp_path / "run")
    assert open_stage("00_setup", "demo", tmp_path / "run").config.profile == "demo"


def test_the_manifest_is_plain_json_that_people_can_read(tmp_path):
    complete(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert list(manifest["stages"]) == [stage.name for stage in STAGES]


@pytest.mark.parametrize("word", ["3", "03", "03_lora_training"])
def test_a_stage_is_found_by_number_or_name(word):
    assert find_stage(word).name == "03_lora_training"


def test_every_stage_reads_only_what_an_earlier_one_writes():
    written: list[str] = []
    for stage in STAGES:
        for name in stage.inputs:
            assert any(out == name or out.startswith(f"{name}/") or name.startswith(f"{out}/") for out in written)
        assert all(needed in {earlier.name for earlier in STAGES[: int(stage.number)]} for needed in stage.needs)
        written += (*stage.outputs, *stage.optional)


def test_what_stayed_in_scratch_is_not_missed_and_anything_else_is(tmp_path):
    names = ("export/merged/model.safetensors", "export/merged_too/model.safetensors")
    outputs = {name: {"sha256": "0", "bytes": 1, "mtime_ns": 1} for name in names}
    write_json(tmp_path / "manifest.json", {"profile": "t4", "stages": {"05_export": {"outputs": outputs}}})
    write_json(
        tmp_path / "export" / "verify.json",
        {"folders": {"merged": "export/merged"}, "files": dict.fromkeys(names, "0")},
    )
    assert len(altered_files(tmp_path)) == 2
    write_state(tmp_path, SeriesState(state="done", left_in_scratch={"export/merged": 16_000_000_000}))
    assert altered_files(tmp_path) == [f"{names[1]} is missing"]
    run = RunDir(tmp_path, load_config("t4"))
    assert altered_exports(run) == [f"{names[1]} is missing"]
    (tmp_path / "export" / "merged").mkdir()
    (tmp_path / names[0]).write_text("half of it")
    assert f"{names[0]} differs from what was written" in altered_files(tmp_path)
