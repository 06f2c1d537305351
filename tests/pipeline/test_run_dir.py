"""The run directory: who may open it, when a stage is out of date, and that a refusal leaves it as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.staged import complete, saved, snapshot, stale, write_outputs
from utils import config, files
from utils import hardware as platforms
from utils.errors import ConfigError, RunDirError
from utils.files import write_text
from utils.pipeline import run_dir as rundir
from utils.pipeline.run_dir import STATE, SeriesState, altered_files, open_run, read_manifest, read_state, write_state
from utils.pipeline.stage import open_stage
from utils.pipeline.stages import BY_NAME, STAGES
from utils.schema import Config


def test_a_new_run_directory_holds_its_manifest_and_the_settings_in_force(tmp_path):
    run = saved("demo", tmp_path / "new", {"train.max_steps": 3})
    assert read_manifest(run.path) == {"profile": "demo", "stages": {}}
    stored = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert Config.model_validate(stored) == run.config and run.config.train.max_steps == 3


def test_fresh_from_a_later_stage_on_keeps_every_commit_and_the_format_that_00_found(tmp_path):
    """Without them 00 counted as out of date, and `--fresh --from 03` was always refused."""
    more = config.load_config("full").model_dump(mode="json")["evaluate"]["more_benchmarks"]
    text = dict.fromkeys(("before", "after", "lead", "close", "end"), "x")
    found = {
        "model.revision": "a" * 40,
        "evaluate.benchmark.revision": "c" * 40,
        "evaluate.more_benchmarks": [section | {"revision": section["name"]} for section in more],
        "prompt.format": {"style": "native", **text},
    }
    wanted = saved("full", tmp_path, found).config
    assert saved("full", tmp_path, {"lora.r": 8}).config.lora.r == 8
    assert open_run("auto", tmp_path, fresh=True, keep_found=True).config == wanted
    listed = {"evaluate.more_benchmarks": more, "data.revision": "d" * 40}
    again = open_run("auto", tmp_path, listed, fresh=True, keep_found=True).config
    assert again.evaluate == wanted.evaluate and again.data.revision == "d" * 40
    assert open_run("auto", tmp_path, fresh=True).config == config.load_config("full")


@pytest.mark.parametrize("written", [0, 1])
def test_killed_while_it_begins_a_run_directory_is_begun_by_the_same_command(tmp_path, monkeypatch, written):
    """Found by the suite of faults: killed after its first file, the run asked for config.yaml, which never was there."""
    real, left = files.write_text, [None] * written

    def write(path: Path, text: str) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        real(path, text)

    monkeypatch.setattr(files, "write_text", write)
    with pytest.raises(KeyboardInterrupt):
        saved("demo", tmp_path / "run", {"train.max_steps": 3})
    monkeypatch.undo()
    assert saved("demo", tmp_path / "run", {"train.max_steps": 3}).config.train.max_steps == 3


def test_the_profile_auto_is_the_run_directorys_own(tmp_path):
    saved("tutorial", tmp_path / "run")
    assert open_run("auto", tmp_path / "run").config.profile == "tutorial"


def test_the_profile_auto_of_a_new_run_directory_is_demo_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(platforms, "gpus", lambda: ())
    assert open_run("auto", tmp_path / "run").config.profile == "demo"


def test_overrides_that_are_valid_with_what_is_stored_are_taken(tmp_path):
    """`evaluate.primary` alone was refused, because it was validated without the benchmark that was named before."""
    items = tmp_path / "items.jsonl"
    items.touch()
    saved("demo", tmp_path / "run", {"evaluate.benchmark.path": str(items)})
    run = saved("demo", tmp_path / "run", {"evaluate.primary": "multiple_choice"})
    assert run.config.evaluate.primary == "multiple_choice" and run.config.evaluate.benchmark.path == items
    with pytest.raises(ConfigError, match=r"evaluate.primary is multiple_choice, but no"):
        open_run("demo", tmp_path / "run", {"evaluate.benchmark": {}})


def test_an_edit_of_the_file_by_hand_counts_and_keeps_its_remarks(tmp_path):
    run = complete(tmp_path)
    file = tmp_path / "config.yaml"
    edited = "# mine\n" + file.read_text(encoding="utf-8").replace("  r: 16\n", "  r: 8\n")
    file.write_text(edited, encoding="utf-8")
    run = open_run("auto", tmp_path)
    assert run.config.lora.r == 8 and set(stale(run)) == {"03"}
    run.save()
    assert file.read_text(encoding="utf-8") == edited
    file.write_text(edited.replace("  r: 8\n", "  r: many\n"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lora.r is 'many': .*config.yaml"):
        open_run("auto", tmp_path)
    assert open_run("auto", tmp_path, {"lora.r": 4}).config.lora.r == 4


def test_a_changed_profile_is_seen_by_a_fresh_run_only(tmp_path, monkeypatch):
    profiles = tmp_path / "profiles"
    shutil.copytree(config.PROFILES, profiles)
    monkeypatch.setattr(config, "PROFILES", profiles)
    saved("demo", tmp_path / "run", {"lora.r": 4})
    demo = profiles / "demo.yaml"
    values = yaml.safe_load(demo.read_text(encoding="utf-8"))
    values["train"]["max_steps"] = 7
    demo.write_text(yaml.safe_dump(values), encoding="utf-8")
    kept, fresh = open_run("demo", tmp_path / "run").config, open_run("demo", tmp_path / "run", fresh=True).config
    assert set(config.differing_settings(kept)) == {"lora.r", "train.max_steps"}
    assert (fresh.train.max_steps, fresh.lora.r) == (7, 16) and config.differing_settings(fresh) == {}


def test_other_data_choose_another_primary_metric_unless_somebody_chose_it(tmp_path):
    rows = str(tmp_path / "rows.jsonl")
    saved("demo", tmp_path / "run")
    assert open_run("auto", tmp_path / "run", {"data.path": rows}).config.evaluate.primary == "nll"
    saved("demo", tmp_path / "run", {"evaluate.primary": "nll"})
    assert open_run("auto", tmp_path / "run", {"data.seed": 1}).config.evaluate.primary == "nll"


def test_a_name_given_to_every_stage_keeps_its_commit_and_another_one_begins_without(tmp_path):
    given = {"evaluate": {"benchmark": {"name": "some/items"}}}
    run = open_stage("00_setup", "demo", tmp_path, given)
    run.pin("evaluate.benchmark.revision", "abc")
    write_outputs(run)
    run.finish()
    assert not open_run("auto", tmp_path, given).stale_because(BY_NAME["00_setup"])
    other = open_run("auto", tmp_path, {"evaluate.benchmark.name": "other/items"})
    assert other.config.evaluate.benchmark.revision is None and "00" in stale(other)


def test_a_run_of_the_version_before_is_resumed_with_the_settings_in_its_config(tmp_path):
    """Its manifest held the overrides and a seal."""
    complete(tmp_path, "03", **{"lora.r": 8})
    manifest = read_manifest(tmp_path) | {"overrides": {"lora.r": 8}, "seal": "0123456789abcdef"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    run = open_run("auto", tmp_path)
    assert run.config.lora.r == 8 and set(stale(run)) == {"04", "05"}


def test_a_run_without_its_settings_is_refused_with_what_to_do(tmp_path):
    complete(tmp_path, "00")
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read .*; bring it back, or begin anew with --fresh"):
        open_run("auto", tmp_path)
    assert open_run("demo", tmp_path, fresh=True).config.profile == "demo"


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
        ("export.push_to_hub", "you/name", set(), ""),
        ("export.install_llama_cpp", True, {"05"}, "export"),  # there are GGUF files then
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
    assert stale(run) == {
        "00": "one of its outputs changed (data/train.parquet differs from what was written)",
        "02": "one of its inputs changed (data/train.parquet was written anew)",
    }
    with pytest.raises(RunDirError, match=r"03_lora_training needs 00_setup, but one of its outputs"):
        open_stage("03_lora_training", "demo", tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_text("other"), Path.unlink, lambda p: write_text(p.with_name("new"), "")]
)
def test_a_changed_removed_or_added_output_makes_its_stage_stale(tmp_path, damage):
    run = complete(tmp_path, "03")
    damage(run.file("training/adapter/part.txt"))
    assert stale(run)["03"].startswith("one of its outputs changed (training/adapter/")
    with pytest.raises(RunDirError, match="04_comparison needs 03_lora_training, but one of its outputs changed"):
        open_stage("04_comparison", "demo", tmp_path)


def test_a_file_that_changed_under_its_old_time_and_size_is_found(tmp_path):
    """A bit that turned over leaves both; files used to be told apart by them alone."""
    run = complete(tmp_path)
    file = run.file("training/adapter/part.txt")
    data, time = file.read_bytes(), file.stat().st_mtime_ns
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(file, ns=(time, time))
    assert stale(run) == {
        "03": "one of its outputs changed (training/adapter/part.txt differs from what was written)",
        "04": "one of its inputs changed (training/adapter/part.txt was written anew)",
        "05": "one of its inputs changed (training/adapter/part.txt was written anew)",
    }


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
    assert run.first_stale(STAGES) == (
        STAGES[1],
        "one of its outputs changed (baseline/nll.parquet differs from what was written)",
    )


def test_a_run_directory_of_another_profile_is_refused_with_both_names(tmp_path):
    with pytest.raises(RunDirError, match="holds a run of the profile demo, not tutorial; name another run directory"):
        open_run("tutorial", complete(tmp_path, "00").path)


def test_a_run_directory_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    complete(tmp_path, "00")
    before = snapshot(tmp_path)

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(rundir.files, "write_text", read_only)
    with pytest.raises(RunDirError, match=r"cannot be written \(Read-only file system\); choose another RUN_DIR."):
        saved("demo", tmp_path, {"train.max_steps": 3})
    assert snapshot(tmp_path) == before


def test_a_run_directory_that_is_a_file_is_a_sentence(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunDirError, match=r"cannot be written \(.*\); choose another RUN_DIR."):
        saved("demo", tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_with_settings_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(RunDirError, match="that no run of this series wrote"):
        open_run("demo", tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_run_whose_manifest_was_deleted_and_a_folder_of_other_files_are_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run = open_run("demo", tmp_path)
    run.save()
    run.file("data").mkdir()
    run.file("data/train.parquet").write_text("rows")
    run.manifest_path.unlink()
    assert open_run("demo", tmp_path).path == tmp_path


def test_a_state_that_was_written_is_read(tmp_path):
    state = SeriesState(state="continue", stage="03_lora_training", kind="SessionOver", sentence="8 h", steps=150)
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state


def test_where_there_is_no_run_directory_no_state_makes_one(tmp_path):
    write_state(tmp_path / "none", SeriesState(state="running"))
    assert not (tmp_path / "none").exists() and read_state(tmp_path / "none") is None


def test_a_state_of_a_version_that_sealed_it_is_read(tmp_path):
    old = {"state": "done", "stage": "", "kind": "", "sentence": "", "steps": 3, "left_in_scratch": {}, "seal": "0f1e"}
    (tmp_path / STATE).write_text(json.dumps(old))
    assert read_state(tmp_path) == SeriesState(state="done", steps=3)


@pytest.mark.parametrize("content", [b"", b"{", b'{"state": "sleeping"}', b"\xff\xfe", b"[]"])
def test_a_state_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / STATE).write_bytes(content)
    assert read_state(tmp_path) is None
