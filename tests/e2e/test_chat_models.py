"""Any chat model: the whole series, from a tiny model of random weights in each form that people bring."""

from __future__ import annotations

import json

import pytest

from tests.chat_forms import FORMS, save_tokenizer
from tests.conftest import run_command

FEW = {
    "prompt.style": "auto", "data.train_rows": 32, "data.eval_rows": 8, "generate.max_new_tokens": 48, "train.max_steps": 2,
    "train.save_steps": 2, "train.per_device_train_batch_size": 4, "export.prompts": 4, "lora.r": 4, "lora.use_rslora": True,
    "lora.target_modules": "all-linear",
}  # fmt: skip


@pytest.mark.parametrize("form", [form for form in FORMS if form != "deepseek-llama"])  # that one is the demo's
def test_the_series_goes_through_with_every_form_of_chat_model(form, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from utils.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(save_tokenizer(form, tmp_path / "model"))
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **special)).save_pretrained(tmp_path / "model")
    settings = [word for key, value in FEW.items() for word in ("--set", f"{key}={value}")]
    command = ("run", "--profile", "demo", "--run-dir", tmp_path / "run", "--set", f"model.name={tmp_path / 'model'}")
    done = run_command(*command, *settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checks = json.loads((tmp_path / "run/export/verify.json").read_text(encoding="utf-8"))["agreement"]
    assert {"adapter", "merged"} <= set(checks)
