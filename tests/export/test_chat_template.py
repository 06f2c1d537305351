"""Every door to the model gives the prompt that it was trained on, token for token."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chat_forms import FORMS, save_tokenizer
from utils.data.prompts import EOS, STYLES, format_prompt
from utils.export import chat_template as serving
from utils.export.chat_template import (
    Served,
    chat_ids,
    chat_template,
    fit_chat_template,
    llama_cpp_lines,
    prompt_ids,
    read_modelfile,
    render_modelfile,
    transformers_lines,
    vllm_lines,
    write_modelfile,
)
from utils.models.prompt_format import make_prompt_format
from utils.models.tiny import CHAT_TEMPLATE
from utils.models.tokenizer import load_tokenizer
from utils.schema import GenerateSection

QUESTIONS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=80)
SAMPLED = GenerateSection(max_new_tokens=1536, temperature=0.6, top_p=0.95)


def served(style="native", **values) -> Served:
    return Served(
        **{"base_id": "owner/base", "base_revision": "a" * 40, "rank": 24, "style": style, "generate": SAMPLED} | values
    )


@pytest.mark.parametrize("style", STYLES)
@given(question=QUESTIONS)
def test_the_chat_template_gives_the_training_prompt_to_the_token(tiny_model, style, question):
    tokenizer = tiny_model[1]
    tokenizer.chat_template = chat_template(style)
    try:
        assert chat_ids(tokenizer, question) == prompt_ids(tokenizer, question, style)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE


@pytest.mark.parametrize("style", STYLES)
@given(question=QUESTIONS)
def test_ollamas_template_gives_the_training_prompt_to_the_token(tiny_model, style, question):
    modelfile = read_modelfile(write_modelfile("model-q4_k_m.gguf", style, SAMPLED, 2048))
    sent = render_modelfile(modelfile, question)
    assert sent == format_prompt(question, style)
    assert tiny_model[1](sent).input_ids == prompt_ids(tiny_model[1], question, style)


def test_the_modelfile_stops_at_the_end_token_and_samples_as_was_measured(tiny_model):
    modelfile = read_modelfile(write_modelfile("model-q8_0.gguf", "native", SAMPLED, 2048))
    assert modelfile.source == "./model-q8_0.gguf"
    assert modelfile.parameters == {
        "stop": [EOS], "temperature": ["0.6"], "top_p": ["0.95"], "num_predict": ["1536"], "num_ctx": ["2048"]
    }  # fmt: skip
    assert tiny_model[1](EOS, add_special_tokens=False).input_ids == [tiny_model[1].eos_token_id]
    greedy = GenerateSection(max_new_tokens=192, do_sample=False)
    assert read_modelfile(write_modelfile("x.gguf", "native", greedy, 9)).parameters["temperature"] == ["0"]


def test_a_finished_turn_is_closed_with_the_end_token():
    template = read_modelfile(write_modelfile("x.gguf", "native", SAMPLED, 2048)).template
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
    modelfile = read_modelfile(write_modelfile("x.gguf", prompt, SAMPLED, 2048))
    assert render_modelfile(modelfile, "Why?") == format_prompt("Why?", prompt)
    assert modelfile.parameters["stop"] == [tokenizer.eos_token]


def test_ours_renders_a_conversation_as_deepseeks_does(tiny_model):
    tokenizer = tiny_model[1]
    turns = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>why</think>b"}, {"role": "user", "content": "c"},
    ]  # fmt: skip
    render = {"tokenize": False, "add_generation_prompt": True}
    theirs = tokenizer.apply_chat_template(turns, **render)
    assert tokenizer.apply_chat_template(turns, chat_template=chat_template("native"), **render) == theirs


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_python_lines_are_python_and_name_the_commit(kind):
    lines = transformers_lines(served(), kind)
    compile(lines, "card", "exec")
    assert ("a" * 40 in lines) == (kind == "adapter")
    assert "temperature=0.6, top_p=0.95" in lines


def test_vllm_gets_a_rank_that_it_takes_and_a_body_that_is_json():
    lines = vllm_lines(served(), "adapter")
    assert "--max-lora-rank 32" in lines and f"--revision {'a' * 40}" in lines and "--enable-lora" in lines
    body = json.loads(lines.split("-d ")[1].strip().strip("'"))
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.95, 1536)
    assert "--enable-lora" not in vllm_lines(served(), "merged")


def test_llama_cpp_is_given_the_smallest_file_and_the_prompt_escaped():
    lines = llama_cpp_lines(served(gguf=("model-f16.gguf", "model-q4_k_m.gguf")))
    assert "-m model-q4_k_m.gguf" in lines and "<｜Assistant｜><think>\\n'" in lines


def test_whatever_a_card_is_served_with_is_read():
    source = Path(serving.__file__).read_text(encoding="utf-8")
    unread = {
        field.name for field in dataclasses.fields(Served) if not re.search(rf"(served|self)\.{field.name}\b", source)
    }
    assert unread == set()
