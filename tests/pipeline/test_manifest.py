"""The manifest: whole or refused, and what differs from it is named."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from tests.staged import complete, snapshot
from utils.errors import RunDirError
from utils.files import write_json
from utils.pipeline.run_dir import altered_files, open_run, read_manifest
from utils.pipeline.stage import open_stage
from utils.pipeline.stages import BY_NAME, STAGES


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
    with pytest.raises(RunDirError, match=r"manifest.json cannot be read .*delete it to run all again by the profile"):
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


def test_what_is_on_record_is_out_of_date_where_a_stage_before_it_was_undone_or_written_anew(tmp_path):
    run = complete(tmp_path)
    compared, exported = BY_NAME["04_comparison"], BY_NAME["05_export"]
    assert run.out_of_date(compared) is None and run.out_of_date(exported) is None
    run.write_record(exported, **run.record(exported) | {"state": "running"})
    assert run.out_of_date(compared) is None  # which does not rest on the export
    assert run.out_of_date(exported) == "05_export is out of date: it was interrupted"
    record = run.record(compared)
    record["inputs"]["training/adapter/part.txt"]["sha256"] = "another"
    run.write_record(compared, **record)
    assert run.out_of_date(compared).startswith(
        "04_comparison is out of date: one of its inputs changed (training/adap"
    )
    run.write_record(BY_NAME["01_baseline_inference"], state="failed")
    assert run.out_of_date(compared) == "01_baseline_inference is out of date: it failed"


def test_a_run_that_was_brought_home_is_current_without_the_model_and_the_rows(tmp_path):
    """They lie where it was computed; what can be looked at here has to be as it was."""
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    rows.write_text("{}")
    model.mkdir()
    (model / "config.json").write_text("{}")
    run = complete(tmp_path / "run", **{"data.path": str(rows), "model.name": str(model)})
    exported = BY_NAME["05_export"]
    rows.unlink()
    shutil.rmtree(model)
    assert run.out_of_date(exported) is None and run.stale_because(exported) is None
