"""Model folders and tokenizers: what cost others days has to stop in a sentence here."""

from __future__ import annotations

import ast
import copy
import json

import pytest

from utils.config import load_config
from utils.data.prompts import BOS, EOS, format_row
from utils.errors import ModelError
from utils.models.prompt_format import check_training_text
from utils.models.tokenizer import check_model, guard_tokenizer, load_tokenizer
from utils.project import NOTEBOOKS

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


def test_a_folder_without_a_tokenizer_is_a_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_model_folder_that_lacks_files_names_them(tmp_path):
    with pytest.raises(ModelError, match=r"lacks config\.json and tokenizer\.json"):
        check_model(config_for(tmp_path))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "models/llama/8b", "my model", "owner/name/"])
def test_a_model_that_is_neither_local_nor_reachable_is_a_sentence(monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="neither a local folder nor reachable"):
        check_model(config_for(name))


ROW = {"Question": "Why?", "Complex_CoT": "Hmm.", "Response": "So."}


@pytest.fixture
def without_bos(tiny_model):
    """A tokenizer as Qwen's or SmolLM2's: it adds nothing."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_model[1])
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def test_a_tokenizer_with_or_without_bos_passes_as_it_is(tiny_model, without_bos):
    """02 ended in a bare AssertionError for a tokenizer without BOS, after the whole baseline had been answered."""
    assert tiny_model[1](EOS).input_ids[0] == tiny_model[1].bos_token_id != without_bos(EOS).input_ids[0]
    for tokenizer in (tiny_model[1], without_bos):
        check_training_text(tokenizer, *format_row(ROW, "native"))


@pytest.mark.parametrize(
    ("prompt", "completion", "said"),
    [(f"{BOS}Why?<think>\n", "So.", "begin with two BOS"), ("Why?\n", f"So.{EOS}", "holds 2 end tokens"), ("Wh", "y?", "joins")],
)  # fmt: skip
def test_a_training_text_that_the_model_would_misread_is_a_sentence(tiny_model, prompt, completion, said):
    tokenizer = copy.deepcopy(tiny_model[1])
    if said == "joins":
        tokenizer.add_tokens(["Why?"])
    with pytest.raises(ModelError, match=said):
        check_training_text(tokenizer, prompt, completion)


def test_a_tokenizer_without_an_end_token_is_a_sentence(without_bos):
    without_bos.eos_token = None
    with pytest.raises(ModelError, match="names no end token"):
        check_training_text(without_bos, "Why?", "So.")


def test_what_does_not_fit_is_said_in_00_and_by_no_bare_assertion_in_02():
    sources = {}
    for name in ("00_setup", "02_dataset_formatting"):
        cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        sources[name] = "\n".join(cell for cell in code if "SERIES_ROOT" not in cell)  # the bootstrap asserts
    assert "check_training_text(" in sources["00_setup"]
    tree = ast.parse(sources["02_dataset_formatting"])
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))
