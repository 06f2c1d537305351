"""Every door to the model gives the prompt that it was trained on, token for token."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chat_forms import FORMS, save_tokenizer
from utils.data.prompts import EOS, format_prompt
from utils.export.chat_template import chat_ids, chat_template, fit_chat_template, make_modelfile, prompt_ids
from utils.models.prompt_format import make_prompt_format
from utils.models.tiny import CHAT_TEMPLATE
from utils.models.tokenizer import load_tokenizer
from utils.schema import GenerateSection

QUESTIONS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=80)
SAMPLED = GenerateSection(max_new_tokens=4096, temperature=0.6, top_p=0.95)


def template_of(modelfile: str) -> str:
    return re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize("style", ["native", "tutorial"])
@given(question=QUESTIONS)
def test_the_chat_template_gives_the_training_prompt_to_the_token(tiny_model, style, question):
    tokenizer = tiny_model[1]
    tokenizer.chat_template = chat_template(style)
    try:
        assert chat_ids(tokenizer, question) == prompt_ids(tokenizer, question, style)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE


@pytest.mark.parametrize("style", ["native", "tutorial"])
@given(question=QUESTIONS)
def test_ollamas_template_gives_the_training_prompt_to_the_token(tiny_model, style, question):
    template = template_of(make_modelfile("model-q4_k_m.gguf", style, SAMPLED, 2048))
    # Ollama sends everything before .Response (ollama/ollama, template/template.go).
    sent = template.partition("{{ .Response }}")[0].replace("{{ .Prompt }}", question)
    assert sent == format_prompt(question, style)
    assert tiny_model[1](sent).input_ids == prompt_ids(tiny_model[1], question, style)


def test_the_modelfile_stops_at_the_end_token_and_samples_as_was_measured(tiny_model):
    lines = make_modelfile("model-q8_0.gguf", "native", SAMPLED, 8192).splitlines()
    assert lines[0] == "FROM ./model-q8_0.gguf"
    assert lines[-5:] == [
        f'PARAMETER stop "{EOS}"', "PARAMETER temperature 0.6", "PARAMETER top_p 0.95", "PARAMETER num_predict 4096",
        "PARAMETER num_ctx 8192",
    ]  # fmt: skip
    assert tiny_model[1](EOS, add_special_tokens=False).input_ids == [tiny_model[1].eos_token_id]
    greedy = GenerateSection(max_new_tokens=192, do_sample=False)
    assert "PARAMETER temperature 0\n" in make_modelfile("x.gguf", "native", greedy, 9)


def test_a_finished_turn_is_closed_with_the_end_token():
    template = template_of(make_modelfile("x.gguf", "native", SAMPLED, 2048))
    assert template == "<｜User｜>{{ .Prompt }}<｜Assistant｜><think>\n{{ .Response }}" + EOS


def test_a_chat_template_that_is_right_is_kept_as_published_and_a_wrong_one_replaced(tiny_model):
    tokenizer = tiny_model[1]
    fit_chat_template(tokenizer, "native")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    # As older copies of the model have it: no opened think block after the assistant's mark.
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<think>\\n", "")
    fit_chat_template(tokenizer, "native")
    assert chat_ids(tokenizer, "What?") == prompt_ids(tokenizer, "What?", "native")
    tokenizer.chat_template = CHAT_TEMPLATE


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_chat_model_is_served_with_its_training_prompt_and_end(form, tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(form, tmp_path))
    prompt = make_prompt_format("auto", tokenizer)
    fit_chat_template(tokenizer, prompt)
    for question in ("What now?", "  A\tB\n\nC. "):
        assert chat_ids(tokenizer, question.strip()) == prompt_ids(tokenizer, question.strip(), prompt)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nb"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).rstrip().endswith(f"b{prompt.end}")
    modelfile = make_modelfile("x.gguf", prompt, SAMPLED, 2048)
    template = template_of(modelfile)
    assert template.split("{{ .Response }}")[0].replace("{{ .Prompt }}", "Why?") == format_prompt("Why?", prompt)
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in modelfile


def test_ours_renders_a_conversation_as_deepseeks_does(tiny_model):
    tokenizer = tiny_model[1]
    turns = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>why</think>b"}, {"role": "user", "content": "c"},
    ]  # fmt: skip
    render = {"tokenize": False, "add_generation_prompt": True}
    theirs = tokenizer.apply_chat_template(turns, **render)
    assert tokenizer.apply_chat_template(turns, chat_template=chat_template("native"), **render) == theirs
