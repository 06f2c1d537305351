"""What would travel to Kaggle: the kernel's metadata, damaged or of another shape."""

from __future__ import annotations

import json

import pytest

from tests.faults.fuzzing import corpus, mutated_bytes, mutated_values, survive, to_json
from utils.kaggle import push
from utils.kaggle.push import read_metadata, reference_of, submission, title_of

KEPT = ("is_private", "enable_gpu", "enable_internet", "machine_shape")
SEEDS = [corpus("metadata", name)[0].read_bytes() for name in ("kernel-metadata.json", "with-sources.json")]


def check_metadata() -> None:
    """What is accepted can be sent, and is private unless it says otherwise."""
    metadata, _ = survive(read_metadata)
    if metadata is None:
        return
    reference, _ = survive(reference_of, metadata, "", "")
    for owner, slug in (("alice", ""), ("", "another-name"), ("a/b", "x")):
        survive(reference_of, metadata, owner, slug)
    survive(title_of, metadata, "another-name")
    if reference is not None:
        sent, _ = survive(submission, metadata, reference, "{}")
        if sent is not None:
            assert json.loads(json.dumps(sent.metadata)) == sent.metadata
            assert {key: sent.metadata[key] for key in KEPT} == {key: metadata[key] for key in KEPT}
            assert sent.reference == reference and reference.count("/") == 1


@pytest.fixture
def metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(push, "METADATA", tmp_path / "kernel-metadata.json")
    return push.METADATA


def test_damaged_metadata_end_in_a_sentence_or_a_request(metadata, fuzz):
    def check(data: bytes) -> None:
        metadata.write_bytes(data)
        check_metadata()

    fuzz.run("kernel metadata: bytes", 1000, mutated_bytes(SEEDS), check)


def test_metadata_of_another_shape_end_in_a_sentence_or_a_request(metadata, fuzz):
    def check(value) -> None:
        metadata.write_bytes(to_json(value))
        check_metadata()

    fuzz.run("kernel metadata: values", 1500, mutated_values([json.loads(seed) for seed in SEEDS]), check)
