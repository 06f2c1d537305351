"""Model folders and tokenizers: what cost others days has to stop in a sentence here."""

from __future__ import annotations

import json

import pytest

from utils.config import load_config
from utils.errors import ModelError
from utils.models.tokenizer import check_model, guard_tokenizer, load_tokenizer

TEXT = "Hello world,\n\nthis is  a test."


def config_for(folder, **overrides):
    return load_config("demo", {"model.name": str(folder), **overrides})


def declare_as_llama(folder):
    """What DeepSeek's own repositories say: LlamaTokenizerFast over a byte-level tokenizer.json."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))


def test_a_tokenizer_declared_as_llama_keeps_its_spaces_here_and_loses_them_elsewhere(tiny_model, tmp_path):
    """transformers issue 45488: the day the second assertion fails, the guard can retire."""
    from transformers import AutoTokenizer

    tiny_model[1].save_pretrained(tmp_path)
    tiny_model[0].config.save_pretrained(tmp_path)
    declare_as_llama(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.encode(TEXT, add_special_tokens=False)) == TEXT
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert " " not in theirs.decode(theirs.encode(TEXT, add_special_tokens=False))
    with pytest.raises(ModelError, match="corrupts text"):
        guard_tokenizer(theirs, "this folder")


def test_the_pad_token_is_never_the_end_token(tiny_model, tmp_path):
    tiny_model[1].save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "pad_token": values["eos_token"]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_tokenizer_over_which_tokenizers_panics_is_a_sentence(tiny_model, tmp_path):
    """Found by `make faults`: a panic in Rust is no Exception, and went past every `except Exception`."""
    tiny_model[1].save_pretrained(tmp_path)
    value = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    value["model"]["continuing_subword_prefix"] = "##"  # longer than what a merge joins
    (tmp_path / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ModelError, match="No tokenizer could be loaded from"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_a_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_model_folder_that_lacks_files_names_them(tmp_path):
    with pytest.raises(ModelError, match=r"lacks config\.json and tokenizer\.json"):
        check_model(config_for(tmp_path))


def test_a_model_that_is_neither_local_nor_reachable_is_a_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="neither a local folder nor reachable"):
        check_model(config_for("nobody/no-such-model"))
