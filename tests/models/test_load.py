"""Model loading: what cost others days has to stop in a sentence here."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor

from benchmarks.standin import quantise
from utils.config import load_config
from utils.errors import HardwareError, ModelError
from utils.models import load
from utils.models.load import (
    add_lora,
    keep_lora_in_float32,
    load_model,
    load_plain,
    start_backend,
    torch_dtype,
)
from utils.schema import LoraSection


def config_for(folder, **overrides):
    return load_config("demo", {"model.name": str(folder), **overrides})


def test_broken_weights_are_a_sentence(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(config_for(folder))


def test_unsloth_without_a_gpu_is_a_sentence(tiny_folder):
    with pytest.raises(HardwareError, match="needs a CUDA GPU"):
        start_backend(config_for(tiny_folder, **{"hardware.backend": "unsloth"}))


@pytest.mark.parametrize(("plan", "target"), [("auto", "1"), ("given", None)])
def test_before_unsloth_is_imported_it_is_told_to_prepare_rows_here_and_how_much_the_loss_may_take(
    tiny_folder, tmp_path, monkeypatch, plan, target
):
    (tmp_path / "unsloth.py").write_text("import os\nfound = dict(os.environ)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "unsloth", None)
    monkeypatch.delitem(sys.modules, "unsloth")
    monkeypatch.setattr(load, "patch_unsloth", lambda: None)
    monkeypatch.setattr(load, "resolve_hardware", lambda _: {"backend": "unsloth", "device": "cuda"})
    for name in ("UNSLOTH_DATASET_NUM_PROC", "UNSLOTH_CE_LOSS_TARGET_GB"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with inductor.patch(deterministic=False):
        assert start_backend(config_for(tiny_folder, **{"train.step_plan": plan})) == "unsloth"
        assert inductor.deterministic  # no kernel is chosen by its time: a resumed training would part
    found = sys.modules["unsloth"].found
    assert found["UNSLOTH_DATASET_NUM_PROC"] == "0" and found.get("UNSLOTH_CE_LOSS_TARGET_GB") == target


_STORED = {"quant_method": "bitsandbytes"}


@pytest.mark.parametrize(("four_bit", "stored"), [(False, _STORED), (True, _STORED), (True, None), (False, None)])
def test_a_model_stored_in_4_bits_is_not_called_16_bit(tiny_folder, monkeypatch, four_bit, stored):
    config = config_for(tiny_folder, **{"model.load_in_4bit": four_bit})
    loaded = SimpleNamespace(config=SimpleNamespace(quantization_config=stored))
    monkeypatch.setattr(load, "load_plain", lambda *_: loaded)
    if stored and not four_bit:
        with pytest.raises(ModelError, match=r"stored quantised, but model\.load_in_4bit is false; name the"):
            load_model(config)
    else:
        assert load_model(config)[0] is loaded


def loading(monkeypatch, config) -> dict:
    """What `load_plain` asks transformers for."""
    asked: dict = {}
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda source, **more: asked.update(more))
    load_plain(config, config.model.name)
    return asked


def test_a_model_that_is_quantised_already_computes_in_the_runs_dtype_and_not_in_its_makers(
    tiny_folder, tmp_path, monkeypatch
):
    folder = shutil.copytree(tiny_folder, tmp_path / "model-bnb-4bit")
    own = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(own | {"quantization_config": stored}))
    asked = loading(monkeypatch, config_for(folder, **{"hardware.dtype": "float16", "model.load_in_4bit": True}))
    assert asked["quantization_config"] is None  # transformers would warn of it, and take the stored one
    assert asked["config"].quantization_config == stored | {"bnb_4bit_compute_dtype": "float16"}


def test_a_sixteen_bit_model_is_quantised_on_loading_only_where_that_is_asked_for(tiny_folder, monkeypatch):
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **options: options)  # bitsandbytes is not here
    in_full = loading(monkeypatch, config_for(tiny_folder))
    assert in_full["quantization_config"] is None and not hasattr(in_full["config"], "quantization_config")
    asked = loading(monkeypatch, config_for(tiny_folder, **{"hardware.dtype": "float16", "model.load_in_4bit": True}))
    assert asked["quantization_config"]["bnb_4bit_compute_dtype"] == torch.float16


def test_a_prequantised_model_gives_the_logits_of_the_one_that_it_was_made_from(tiny_folder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is of requirements.txt")
    quantise(tiny_folder, tmp_path / "model-bnb-4bit")
    four_bit, ids = {"model.load_in_4bit": True}, torch.tensor([[1, 5, 9, 12]])
    (made, _), (stored, _) = (
        load_model(config_for(at, **four_bit)) for at in (tiny_folder, tmp_path / "model-bnb-4bit")
    )
    assert stored.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert stored.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    torch.testing.assert_close(stored(input_ids=ids).logits, made(input_ids=ids).logits, atol=0.05, rtol=0.05)


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


@pytest.mark.parametrize("in_4bit", [True, False])
def test_an_emulated_t4_has_its_memory_attention_and_choice_of_4bit_products(monkeypatch, in_4bit):
    ops, switched = SimpleNamespace(_gpu_dispatch_props="this GPU's"), []
    for name, module in {
        "bitsandbytes": None,
        "bitsandbytes.backends": None,
        "bitsandbytes.backends.cuda": ops,
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(ops=module))
    monkeypatch.setattr(load, "resolve_hardware", lambda _: {"device": "cuda"})
    monkeypatch.setattr(load, "gpu_ids", list)
    for name in ("enable_flash_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, name, lambda on, name=name: switched.append((name, on)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=56 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: switched.append(share))
    load.prepare_device(load_config("t4", {"hardware.emulate_t4": True, "model.load_in_4bit": in_4bit}))
    assert switched == [("enable_flash_sdp", False), ("enable_cudnn_sdp", False), 0.25]
    assert ops._gpu_dispatch_props == "this GPU's" if not in_4bit else ops._gpu_dispatch_props(0) == (40, 7, 5)
