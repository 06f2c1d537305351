"""Prompts: DeepSeek's chat format and the published template, letter for letter, the same in training and inference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data.prompts import (
    BOS,
    EOS,
    PAD,
    format_completion,
    format_multiple_choice,
    format_prompt,
    format_row,
)
from utils.evaluation.answer_parsing import parse_completion
from utils.models.tiny import CHAT_TEMPLATE

# The tutorial's train_prompt_style as published; the lines' trailing spaces are its own.
PUBLISHED = """Below is an instruction that describes a task, paired with an input that provides further context.\x20
Write a response that appropriately completes the request.\x20
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a logical and accurate response.

### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.\x20
Please answer the following medical question.\x20

### Question:
{}

### Response:
<think>
{}
</think>
{}"""
ROW = {"Question": "Why {x}, {0} or {question}?", "Complex_CoT": "{y}\nHmm.", "Response": "{}."}


def test_the_tutorials_training_text_is_the_published_template_letter_for_letter():
    assert "".join(format_row(ROW, "tutorial")) == PUBLISHED.format(*ROW.values())


def test_the_tutorials_inference_prompt_ends_in_an_opened_block_without_a_newline():
    prompt = format_prompt("Why?", "tutorial")
    assert prompt == PUBLISHED.split("\n{}\n</think>")[0].replace("{}", "Why?")
    assert prompt.endswith("### Response:\n<think>")


def test_the_native_prompt_is_deepseeks_format():
    assert format_prompt("Why?", "native") == "<｜User｜>Why?<｜Assistant｜><think>\n"
    assert format_completion("Hmm.", "So.", "native") == "Hmm.\n</think>\n\nSo."


def test_the_native_prompt_is_what_the_chat_template_renders_after_bos():
    from jinja2 import Template

    message = {"role": "user", "content": "Why?"}
    rendered = Template(CHAT_TEMPLATE).render(bos_token=BOS, messages=[message], add_generation_prompt=True)
    assert rendered == BOS + format_prompt("Why?", "native")


@pytest.mark.parametrize("style", ["native", "tutorial"])
def test_the_training_text_begins_with_the_inference_prompt(style):
    assert format_row(ROW, style)[0] == format_prompt(ROW["Question"], style)


@pytest.mark.parametrize("style", ["native", "tutorial"])
def test_a_row_without_reasoning_closes_the_think_block_that_the_prompt_opened(style):
    text = "".join(format_row(ROW | {"Complex_CoT": ""}, style))
    assert "<think>\n</think>\n" in text and text.startswith(format_prompt(ROW["Question"], style))


@pytest.mark.parametrize("style", ["native", "tutorial"])
@pytest.mark.parametrize("mark", [BOS, EOS, PAD])
def test_no_mark_that_tokenizer_or_trainer_adds_is_in_a_string(style, mark):
    assert mark not in "".join(format_row(ROW, style))


@pytest.mark.parametrize("style", ["native", "tutorial"])
@given(question=st.text())
def test_any_question_survives_in_its_prompt(style, question):
    before, after = format_prompt("\0", style).split("\0")
    assert format_prompt(question, style) == before + question + after


@pytest.mark.parametrize("style", ["native", "tutorial"])
@given(reasoning=st.text("ab{}.\n 医"), response=st.text("ab{}.\n 医", min_size=1).filter(str.strip))
def test_a_completion_is_parsed_back_into_its_parts(style, reasoning, response):
    parsed = parse_completion(format_completion(reasoning, response, style))
    assert (parsed.reasoning, parsed.answer, parsed.well_formed) == (reasoning.strip(), response.strip(), True)


def test_a_multiple_choice_question_lists_its_options_and_asks_for_a_letter():
    assert format_multiple_choice("Which?", {"A": "one {x}", "B": "two"}) == (
        'Which?\n\nA. one {x}\nB. two\n\nThink it through, then end with "The answer is X.", where X is one of A, B.'
    )
