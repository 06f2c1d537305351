"""Which 16-bit model an adapter is merged into."""

from __future__ import annotations

import pytest

from utils.config import load_config
from utils.errors import ModelError
from utils.export.base_model import find_base, merged_into, sixteen_bit_source, trained_on

HUB = "unsloth/DeepSeek-R1-Distill-Llama-8B"


@pytest.mark.parametrize("suffix", ["-bnb-4bit", "-unsloth-bnb-4bit"])
def test_a_prequantised_repository_is_merged_into_its_sixteen_bit_sibling(suffix):
    config = load_config("t4", {"model.name": HUB + suffix, "model.revision": "a" * 40})
    assert sixteen_bit_source(config) == (HUB, None)  # that commit is another repository's
    pinned = load_config("t4", {"model.name": HUB + suffix, "export.base_revision": "b" * 40})
    assert sixteen_bit_source(pinned) == (HUB, "b" * 40)
    assert trained_on(config) == (HUB + suffix, "a" * 40)


def test_a_sixteen_bit_repository_is_its_own_base_at_the_pinned_commit():
    config = load_config("t4", {"model.name": HUB, "model.revision": "a" * 40})
    assert sixteen_bit_source(config) == (HUB, "a" * 40)


def test_a_named_base_comes_first(tiny_folder):
    config = load_config("t4", {"export.base": str(tiny_folder)})
    assert find_base(config) == (tiny_folder, None) and merged_into(config) == ("tiny", None)


def test_the_hub_is_asked_for_weights_and_settings_of_one_commit_only(monkeypatch, tmp_path):
    asked = {}

    def download(source, **options):
        asked.update(options, source=source)
        return str(tmp_path / ("d" * 40))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = load_config("t4", {"model.name": HUB, "model.revision": "a" * 40})
    assert find_base(config)[1] == "d" * 40 and merged_into(config) == (HUB, "a" * 40)
    assert asked["revision"] == "a" * 40 and asked["source"] == HUB
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects(
        ["model-1.safetensors", "config.json", "model.bin", "original/params.json", "x.gguf", "a/b.safetensors"],
        allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"],
    )  # fmt: skip
    assert list(kept) == ["model-1.safetensors", "config.json"]


def test_a_base_out_of_reach_is_a_sentence(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"neither a local folder nor reachable on the Hub .*export\.base=FOLDER"):
        find_base(load_config("t4", {"model.name": HUB}))
