"""Files: what is on disk is whole, a digest says what it was, and a disk that is full is a sentence with numbers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import files
from utils.files import (
    atomic,
    digests,
    fingerprint,
    is_folder,
    is_there,
    list_files,
    record_files,
    relative_name,
    sha256,
    sweep_scratch,
    write_json,
    write_text,
)
from utils.project import ROOT


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_makes_the_folders_that_it_needs(tmp_path):
    write_text(tmp_path / "a" / "b" / "c.txt", "naïve 医 🩺\u2028")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "naïve 医 🩺\u2028".encode()


def test_a_write_that_fails_leaves_the_old_file_and_no_scratch(tmp_path):
    path = tmp_path / "table.csv"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic(path) as scratch:
        scratch.write_text("half a ta")
        raise RuntimeError("killed")
    assert path.read_text() == "old" and names(tmp_path) == ["table.csv"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_json_is_written_readably_and_read_back_as_it_was(tmp_path):
    value = {"share": 0.25, "text": "医\u2028🩺", "none": None, "list": [1, 2]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "医" in text and text.endswith("}\n") and '\n  "share"' in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"when": object()}])
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, value):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", {"value": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1} and names(tmp_path) == ["a.json"]


def test_a_digest_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_folder_is_listed_sorted_with_its_subfolders_and_without_scratch(tmp_path):
    for name in ("f/b.txt", "f/a.txt", "f/sub/c.txt", "f/.a.txt.1.tmp", "g.txt"):
        write_text(tmp_path / name, name)
    listed = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path, "f")]
    assert listed == ["f/a.txt", "f/b.txt", "f/sub/c.txt"]
    assert list_files(tmp_path, "g.txt") == [tmp_path / "g.txt"]
    assert list_files(tmp_path, "absent") == []


def test_a_record_holds_digest_and_size_of_every_file(tmp_path):
    write_text(tmp_path / "f" / "a.txt", "abc")
    records = record_files(tmp_path, ("f", "absent"))
    assert list(records) == ["f/a.txt"] and records["f/a.txt"]["bytes"] == 3
    assert digests(records) == {"f/a.txt": hashlib.sha256(b"abc").hexdigest()}


def test_what_was_set_aside_is_no_part_of_a_record(tmp_path):
    """It made a comparison stale that had cost hours: an answer given again left answers.jsonl.old beside itself."""
    (tmp_path / "data").mkdir()
    for name in ("answers.jsonl", "answers.jsonl.old"):
        (tmp_path / "data" / name).write_text("{}")
    assert list(record_files(tmp_path, ("data",))) == ["data/answers.jsonl"]


def test_a_large_file_of_known_size_and_time_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_READ_AGAIN", 2)
    write_text(tmp_path / "a.txt", "abc")
    known = record_files(tmp_path, ("a.txt",))
    known["a.txt"]["sha256"] = "as on record"
    assert digests(record_files(tmp_path, ("a.txt",), known)) == {"a.txt": "as on record"}
    os.utime(tmp_path / "a.txt", ns=(0, 0))
    assert digests(record_files(tmp_path, ("a.txt",), known)) == {"a.txt": hashlib.sha256(b"abc").hexdigest()}


def test_a_file_of_known_time_and_another_size_is_read_again(tmp_path):
    write_text(tmp_path / "a.txt", "abc")
    known = record_files(tmp_path, ("a.txt",))
    write_text(tmp_path / "a.txt", "abcd")
    os.utime(tmp_path / "a.txt", ns=(known["a.txt"]["mtime_ns"],) * 2)
    assert digests(record_files(tmp_path, ("a.txt",), known)) != digests(known)


def test_a_fingerprint_follows_a_files_bytes_and_a_folders_files(tmp_path):
    write_text(tmp_path / "rows.jsonl", "{}")
    assert fingerprint(tmp_path / "rows.jsonl") == sha256(tmp_path / "rows.jsonl")
    write_text(tmp_path / "model" / "config.json", "{}")
    before = fingerprint(tmp_path / "model")
    assert fingerprint(tmp_path / "model") == before
    write_text(tmp_path / "model" / "model.safetensors", "weights")
    assert fingerprint(tmp_path / "model") != before


def test_a_fingerprint_does_not_go_into_folders_below(tmp_path):
    """Found by `make faults`: a path that named a whole home directory was read for minutes."""
    write_text(tmp_path / "model" / "config.json", "{}")
    before = fingerprint(tmp_path / "model")
    write_text(tmp_path / "model" / "deep" / "er" / "rows.jsonl", "{}")
    assert fingerprint(tmp_path / "model") == before


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_system_takes_is_not_there(name):
    assert not is_there(Path(name)) and not is_folder(name)


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from utils.files import atomic, atomic_folder\n"
        f"with atomic_folder(Path({str(tmp_path)!r}) / 'folder') as folder, atomic(Path({str(tmp_path)!r}) / 'a/file') as file:\n"
        "    (folder / 'part').touch(); file.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    kept = [tmp_path / "a" / ".hidden", tmp_path / ".folder.old", tmp_path / "a" / "notes.tmp"]
    for path in kept:
        path.touch()
    assert len([*tmp_path.rglob(".*.tmp")]) == 2
    sweep_scratch(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept) and not [*tmp_path.rglob(".*.tmp")]


@pytest.mark.parametrize("name", ["a", "a/b.c", "export/merged/模型.safetensors", "..a/b..", ".a"])
def test_a_name_below_a_folder_is_one(name):
    assert relative_name(name).as_posix() == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "/a", "a/..", "a/../b", "../a", "./a", "a/./b", "a//b", "a/", "a\\b", "..\\a", "a\0b", "a\nb", "a\u202eb", "\ud800"],
)  # fmt: skip
def test_a_name_that_points_outside_or_may_be_read_in_two_ways_is_none(name):
    assert relative_name(name) is None


def test_a_torn_line_is_passed_over_and_never_glued_to(tmp_path):
    file = tmp_path / "rows.jsonl"
    files.append_lines(file, [{"id": "a"}, {"id": "ü"}])
    with file.open("ab") as stream:
        stream.write('{"id": "ü'.encode()[:-1])  # a kill in the middle of a character
    assert files.read_lines(file) == [{"id": "a"}, {"id": "ü"}]
    files.append_lines(file, [{"id": "c"}])
    assert files.read_lines(file) == [{"id": "a"}, {"id": "ü"}, {"id": "c"}]
    files.write_lines(file, [{"id": "d"}])
    assert file.read_text() == '{"id": "d"}\n' and files.read_lines(tmp_path / "none") == []
