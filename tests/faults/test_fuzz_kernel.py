"""What would travel to Kaggle: the kernel's metadata and its notebook, damaged or of another shape."""

from __future__ import annotations

import json

import pytest

from tests.faults.fuzzing import corpus, mutated_bytes, mutated_values, survive, to_json
from utils.kaggle import push
from utils.kaggle.bundle import with_parameters
from utils.kaggle.push import (
    body_of,
    build_request,
    check_text,
    describe_request,
    read_metadata,
    reference_of,
    title_of,
)

SEEDS = [corpus("metadata", name)[0].read_bytes() for name in ("kernel-metadata.json", "with-sources.json")]
NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# A"},
        {"cell_type": "code", "id": "b", "metadata": {"tags": ["parameters"]}, "execution_count": None, "outputs": [],
         "source": ["PROFILE = \"auto\"\n", "RUN_DIR = \"\"\n", "OVERRIDES = {}"]},
    ],
    "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    "nbformat": 4, "nbformat_minor": 5,
}  # fmt: skip


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
        request, _ = survive(build_request, metadata, reference, "{}")
        if request is not None:
            body = body_of(request)
            assert json.loads(json.dumps(body)) == body
            assert body["isPrivate"] == metadata["is_private"] and body["enableGpu"] == metadata["enable_gpu"]
            assert body["slug"] == reference and reference.count("/") == 1


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


def test_a_damaged_notebook_ends_in_a_sentence_or_may_travel(fuzz, monkeypatch):
    monkeypatch.setattr(push, "known_values", dict)

    def check(data: bytes) -> None:
        survive(check_text, data.decode("utf-8", "replace"))

    fuzz.run("notebooks: bytes", 500, mutated_bytes([to_json(NOTEBOOK)]), check)


def test_a_notebook_of_another_shape_ends_in_a_sentence_or_may_travel(metadata, fuzz, monkeypatch):
    monkeypatch.setattr(push, "known_values", dict)
    metadata.write_bytes(SEEDS[0])
    whole = read_metadata()

    def check(value) -> None:
        text = json.dumps(value)
        _, refused = survive(check_text, text)
        if refused is None:
            request, _ = survive(build_request, whole, "alice/deepseek-r1-medical-lora", text)
            survive(describe_request, request)
            survive(with_parameters, json.loads(text), {"PROFILE": "t4"})

    fuzz.run("notebooks: values", 1000, mutated_values([NOTEBOOK]), check)
