"""Every input that once ended in a traceback: each of these files now ends in a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.fuzzing import corpus, survive
from utils import secrets
from utils.config import load_config
from utils.export.merge import read_lora
from utils.export.verify import read_record
from utils.kaggle import push
from utils.kaggle.push import read_metadata, reference_of
from utils.pipeline.run_dir import RunDir, read_manifest

SOUND = ("kernel-metadata.json", "with-sources.json")  # these say nothing wrong


def read_exports(folder: Path):
    return read_record(RunDir(folder, load_config("demo")))


def send_metadata(folder: Path):
    return reference_of(read_metadata(), "alice")


READERS = {  # area: (the name under which the file is read, by whom)
    "manifests": ("manifest.json", read_manifest),
    "exports": ("export/verify.json", read_exports),
    "adapters": ("adapter_config.json", read_lora),
    "metadata": ("kernel-metadata.json", send_metadata),
}
CASES = [(area, path) for area in READERS for path in corpus(area)]


@pytest.mark.parametrize(("area", "path"), CASES, ids=[f"{area}/{path.name}" for area, path in CASES])
def test_a_file_of_the_corpus_ends_in_a_sentence(area, path, tmp_path, monkeypatch, fault):
    fault(f"found before: {area}")
    name, read = READERS[area]
    monkeypatch.setattr(push, "METADATA", tmp_path / name)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(path, tmp_path / name)
    assert (survive(read, tmp_path) is not None) == (path.name in SOUND)


@pytest.mark.parametrize("path", corpus("secrets"), ids=lambda path: path.name)
def test_a_secret_that_could_not_be_sent_is_none(path, tmp_path, monkeypatch, fault):
    fault("found before: secrets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(secrets, "ROOT", tmp_path)
    for name in ("HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in secrets.NAMES["HF_TOKEN"]:
        monkeypatch.delenv(name, raising=False)
    shutil.copy(path, tmp_path / ".env")
    assert secrets.find_secret("HF_TOKEN").value is None
