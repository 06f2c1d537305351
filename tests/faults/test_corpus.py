"""Every input that once ended otherwise: each of these files now ends in a sentence, or in what it says here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.fuzzing import corpus, survive
from utils import secrets as credentials
from utils.config import load_config
from utils.export.merge import INDEX, find_shards
from utils.export.verify import export_folders
from utils.kaggle import push
from utils.kaggle.push import read_metadata, reference_of
from utils.pipeline.run_dir import RunDir, read_manifest

SOUND = ("kernel-metadata.json", "with-sources.json")  # these say nothing wrong


def manifests(path: Path, folder: Path):
    shutil.copy(path, folder / "manifest.json")
    return read_manifest(folder)


def exports(path: Path, folder: Path):
    (folder / "export").mkdir()
    shutil.copy(path, folder / "export" / "verify.json")
    return export_folders(RunDir(folder, load_config("demo")))


def indices(path: Path, folder: Path):
    shutil.copy(path, folder / INDEX)
    return find_shards(folder)


def metadata(path: Path, folder: Path):
    push.METADATA = path
    found = read_metadata()
    return reference_of(found, "alice")


READERS = (manifests, exports, indices, metadata)
CASES = [(read, path) for read in READERS for path in corpus(read.__name__)]


@pytest.mark.parametrize(("read", "path"), CASES, ids=[f"{read.__name__}/{path.name}" for read, path in CASES])
def test_a_file_of_the_corpus_ends_in_a_sentence(read, path, tmp_path, monkeypatch, record_fault):
    monkeypatch.setattr(push, "METADATA", push.METADATA)  # put back afterwards
    found, sentence = survive(read, path, tmp_path)
    as_it_says = (sentence is None) == (path.name in SOUND) == (found is not None)
    record_fault(f"found before: {read.__name__}", survived=int(as_it_says))
    assert as_it_says, sentence


@pytest.mark.parametrize("path", corpus("secrets"), ids=lambda path: path.name)
def test_a_secret_that_could_not_be_sent_is_none(path, tmp_path, monkeypatch, record_fault):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(credentials, "ROOT", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in credentials.NAMES["HF_TOKEN"]:
        monkeypatch.delenv(name, raising=False)
    shutil.copy(path, tmp_path / ".env")
    secret = credentials.find_secret("HF_TOKEN")
    record_fault("found before: secrets", survived=int(secret.value is None))
    assert secret.value is None
