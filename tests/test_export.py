"""Exports are checked weight by weight, and a folder that is there is whole."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from utils.config import load_config
from utils.errors import ModelError
from utils.export import agreement, check_merged_weights, copy_adapter, merge_adapter, sixteen_bit_source
from utils.models import load_model
from utils.rundir import open_run


@pytest.fixture
def trained_run(tiny_folder, tmp_path):
    """A run directory with an adapter whose B is not zero."""
    run = open_run("demo", tmp_path / "run", {"model.name": str(tiny_folder)})
    run.save()
    model, tokenizer = load_model(run.config)
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for part in (model, tokenizer):
        part.save_pretrained(run.file("training/adapter"))
    return run


def test_the_merged_weights_are_base_plus_adapter_and_a_changed_one_is_found(trained_run):
    copy_adapter(trained_run)
    merged = merge_adapter(trained_run)
    assert check_merged_weights(trained_run)["modules"] == 4
    tensors = load_file(merged / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 0.01
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="differ from base plus adapter"):
        check_merged_weights(trained_run)


def test_an_adapter_that_is_not_finite_is_refused_and_the_earlier_export_stays(trained_run):
    merged = merge_adapter(trained_run)
    before = (merged / "model.safetensors").read_bytes()
    weights = trained_run.file("training/adapter/adapter_model.safetensors")
    tensors = load_file(weights)
    next(value for key, value in tensors.items() if "lora_B" in key)[0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be merged"):
        merge_adapter(trained_run)
    assert (merged / "model.safetensors").read_bytes() == before
    assert not trained_run.file("export/.merged.tmp").exists()


def test_too_little_disk_is_told_with_numbers_before_anything_is_written(trained_run, monkeypatch):
    from utils import platforms
    from utils.errors import HardwareError

    monkeypatch.setattr(platforms, "free_disk_gib", lambda _: 0.01)
    with pytest.raises(HardwareError, match=r"merged model needs 0\.1 GiB .* found 0\.0 GiB"):
        merge_adapter(trained_run)
    assert not trained_run.file("export/merged").exists()


def test_agreement_counts_identical_answers_and_their_common_beginning():
    figures = agreement([[1, 2, 3], [4, 5]], [[1, 2, 9], [4, 5]])
    assert figures == {"prompts": 2, "identical": 1, "mean_common_tokens": 2.0}


@pytest.mark.parametrize("suffix", ["-bnb-4bit", "-unsloth-bnb-4bit"])
def test_a_prequantised_repository_is_merged_into_its_sixteen_bit_sibling(suffix):
    config = load_config("t4", {"model.name": f"unsloth/DeepSeek-R1-Distill-Llama-8B{suffix}"})
    assert sixteen_bit_source(config) == "unsloth/DeepSeek-R1-Distill-Llama-8B"
