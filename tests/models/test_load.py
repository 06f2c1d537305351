"""Model loading: what cost others days has to stop in a sentence here."""

from __future__ import annotations

import pytest
import torch

from utils.config import load_config
from utils.errors import HardwareError, ModelError
from utils.models.load import (
    add_lora,
    keep_lora_in_float32,
    load_model,
    start_backend,
    torch_dtype,
)
from utils.schema import LoraSection


def config_for(folder, **overrides):
    return load_config("demo", {"model.name": str(folder), **overrides})


def test_broken_weights_are_a_sentence(tiny_folder, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(config_for(folder))


def test_unsloth_without_a_gpu_is_a_sentence(tiny_folder):
    with pytest.raises(HardwareError, match="needs a CUDA GPU"):
        start_backend(config_for(tiny_folder, **{"hardware.backend": "unsloth"}))


def test_fresh_lora_changes_nothing_and_is_the_same_for_the_same_seed(tiny_folder):
    config = config_for(tiny_folder)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    ids = torch.tensor([[1, 5, 9, 12]])
    weights = []
    for _ in range(2):
        model, _ = load_model(config)
        before = model(input_ids=ids).logits
        model = add_lora(model, config, **lora)
        assert torch.equal(model(input_ids=ids).logits, before)
        weights.append([p.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_all_linear_adapts_the_seven_projections_and_rslora_scales_by_the_root_of_r(tiny_folder):
    config = config_for(tiny_folder, **{"lora.target_modules": "all-linear", "lora.use_rslora": True, "lora.r": 4})
    lora = config.lora.model_dump()
    model = add_lora(load_model(config)[0], config, **lora, task_type="CAUSAL_LM")
    adapted = {
        name.rsplit(".", 1)[-1]: m.scaling["default"] for name, m in model.named_modules() if hasattr(m, "lora_A")
    }
    assert set(adapted) == set(LoraSection().target_modules) and len(adapted) == 7
    assert set(adapted.values()) == {config.lora.lora_alpha / 2}


def test_lora_weights_are_float32_again_after_trl_made_them_bfloat16(tiny_folder):
    """TRL issue 4901: fp16's gradient scaler has no kernel for bfloat16 gradients."""
    config = config_for(tiny_folder)
    model = add_lora(load_model(config)[0], config, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    keep_lora_in_float32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_dtype_is_what_the_profile_forces_and_on_a_cpu_what_its_processor_multiplies(tiny_folder, monkeypatch):
    assert torch_dtype(config_for(tiny_folder)) == torch.float32
    assert torch_dtype(config_for(tiny_folder, **{"hardware.dtype": "float16"})) == torch.float16
    for has_instructions, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr("utils.hardware.cpu_multiplies_bfloat16", lambda found=has_instructions: found)
        assert torch_dtype(config_for(tiny_folder, **{"hardware.dtype": "auto"})) == dtype
