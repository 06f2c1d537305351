"""The manifest: whole or refused, and what differs from it is named."""

from __future__ import annotations

import json
import os

import pytest

from tests.staged import complete, snapshot
from utils.errors import RunDirError
from utils.files import write_json
from utils.pipeline.manifest import altered_files, read_manifest, stale_on_record
from utils.pipeline.run_dir import open_run
from utils.pipeline.stage import open_stage
from utils.pipeline.stages import BY_NAME, STAGES
from utils.pipeline.state import SeriesState, write_state


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


@pytest.mark.parametrize("name", ["../a", "/a", "a\\b", "data/\n.jsonl", "data//a", "data/./a"])
def test_a_manifest_with_a_name_that_is_none_below_the_run_directory_is_refused(tmp_path, name):
    outputs = {name: {"sha256": "0", "bytes": 1, "mtime_ns": 1}}
    write_json(tmp_path / "manifest.json", {"profile": "t4", "stages": {"05_export": {"outputs": outputs}}})
    with pytest.raises(RunDirError, match="does not lie below the run directory"):
        read_manifest(tmp_path)


def test_the_manifest_is_plain_json_that_people_can_read(tmp_path):
    complete(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert list(manifest["stages"]) == [stage.name for stage in STAGES]


def test_what_stayed_in_scratch_is_not_missed_and_anything_else_is(tmp_path):
    names = ("export/merged/model.safetensors", "export/merged_too/model.safetensors")
    outputs = {name: {"sha256": "0", "bytes": 1, "mtime_ns": 1} for name in names}
    write_json(tmp_path / "manifest.json", {"profile": "t4", "stages": {"05_export": {"outputs": outputs}}})
    assert len(altered_files(tmp_path)) == 2
    write_state(tmp_path, SeriesState(state="done", left_in_scratch={"export/merged": 16_000_000_000}))
    assert altered_files(tmp_path) == [f"{names[1]} is missing"]
    (tmp_path / "export" / "merged").mkdir(parents=True)
    (tmp_path / names[0]).write_text("half of it")
    assert f"{names[0]} differs from what was written" in altered_files(tmp_path)


def test_what_is_on_record_is_stale_where_a_stage_before_it_was_undone_or_written_anew(tmp_path):
    manifest = read_manifest(complete(tmp_path).path)
    compared, exported = BY_NAME["04_comparison"], BY_NAME["05_export"]
    assert stale_on_record(manifest, compared) is None and stale_on_record(manifest, exported) is None
    manifest["stages"]["05_export"]["state"] = "running"
    assert stale_on_record(manifest, compared) is None  # which does not rest on the export
    assert stale_on_record(manifest, exported) == "05_export was interrupted"
    manifest["stages"]["03_lora_training"]["outputs"]["training/log.csv"]["sha256"] = "another"
    manifest["stages"]["04_comparison"]["inputs"]["training/log.csv"] = {"sha256": "one"}
    assert (
        stale_on_record(manifest, compared) == "04_comparison is out of date: training/log.csv was written anew since"
    )
    manifest["stages"]["01_baseline_inference"]["state"] = "failed"
    assert stale_on_record(manifest, compared) == "01_baseline_inference failed"
    assert stale_on_record(manifest | {"overrides": {"data.seed": -1}}, BY_NAME["00_setup"]).startswith(
        "00_setup is out"
    )
