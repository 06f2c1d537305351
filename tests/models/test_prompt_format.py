"""Any chat model: the text around a question is the model's own, proven token by token, or one sentence says what does not fit."""

from __future__ import annotations

import functools
from functools import cache

import pytest

from tests.chat_forms import FORMS, save_tokenizer
from utils.config import differing_settings, load_config
from utils.data.prompts import NATIVE, find_format, format_prompt, format_row
from utils.errors import ModelError, RunDirError
from utils.evaluation.answer_parsing import parse_completion
from utils.models.prompt_format import check_training_text, count_reasoning, make_prompt_format
from utils.models.tokenizer import load_tokenizer

ROWS = [
    {"Question": "A man of 45 has a fever. Why?", "Complex_CoT": "Okay, so\n\nhmm.", "Response": "- One\n- Two"},
    {"Question": "一名女性患者出现发热？", "Complex_CoT": "> quoted", "Response": "(A)"},
]
CHATML = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n"
SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
EXPECTED = {  # form: (before, after, end, BOS at the start)
    "deepseek-llama": (NATIVE.before, NATIVE.after, NATIVE.end, 1),
    "r1-distill-qwen": (NATIVE.before, NATIVE.after, NATIVE.end, 1),
    "llama-3.2": (
        f"{SYSTEM}<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<think>\n",
        "<|eot_id|>",
        1,
    ),
    "qwen3": (*CHATML, "<|im_end|>", 0),
    "smollm2": (
        f"<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n{CHATML[0]}",
        CHATML[1],
        "<|im_end|>",
        0,
    ),
}


@pytest.fixture(scope="session")
def form(tmp_path_factory):
    """A function that gives the loaded tokenizer of a form."""
    folder = tmp_path_factory.mktemp("forms")

    @cache
    def load(name: str):
        return load_tokenizer(save_tokenizer(name, folder / name))

    return load


@pytest.mark.parametrize("name", FORMS)
def test_the_format_is_the_models_own_and_its_tokens_are_proven(form, name):
    tokenizer = form(name)
    found = make_prompt_format("auto", tokenizer)
    before, after, end, bos = EXPECTED[name]
    assert (found.before, found.after, found.end) == (before, after, end)
    assert found.style == ("native" if name in ("deepseek-llama", "r1-distill-qwen") else "chat")
    assert len(tokenizer("").input_ids) == bos
    for row in ROWS:
        prompt, completion = format_row(row, found)
        check_training_text(tokenizer, prompt, completion)
        parsed = parse_completion(completion)
        assert parsed.well_formed and (parsed.reasoning, parsed.answer) == (row["Complex_CoT"], row["Response"])


@pytest.mark.parametrize("name", FORMS)
def test_the_prompt_is_what_the_chat_template_gives_with_an_opened_think_block(form, name):
    tokenizer = form(name)
    ours = tokenizer(format_prompt("Why?", make_prompt_format("chat", tokenizer))).input_ids
    turn = [{"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
    text += "" if text.endswith("<think>\n") else "<think>\n"
    assert ours == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_ends_in_one_token_and_padding_is_another_where_there_is_one(form, name):
    tokenizer = form(name)
    assert tokenizer.eos_token == EXPECTED[name][2]
    assert tokenizer.encode(tokenizer.eos_token, add_special_tokens=False) == [tokenizer.eos_token_id]
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) is (name == "r1-distill-qwen")


@pytest.mark.parametrize("name", FORMS)
def test_reasoning_is_counted_up_to_its_mark_in_however_many_tokens(form, name):
    encode = functools.partial(form(name).encode, add_special_tokens=False)
    reasoning, answer = encode("Okay, so hmm.\n</think>"), encode("\n\nGout.")
    assert (len(encode("</think>")) == 1) is (name not in ("llama-3.2", "smollm2"))
    assert count_reasoning(form(name), reasoning + answer) == len(reasoning)
    assert count_reasoning(form(name), reasoning[:-1]) == len(reasoning) - 1
    assert count_reasoning(form(name), []) == 0


def test_the_end_token_is_the_templates_where_the_file_names_another(tmp_path):
    """SmolLM2's GGUF names <|im_start|>, and generation would stop before the first word."""
    tokenizer = load_tokenizer(save_tokenizer("smollm2", tmp_path, eos_token="<|im_start|>"))
    assert tokenizer.eos_token == "<|im_end|>"


DROPS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
MOVES = (
    "{% for m in messages %}{% set p = m['content'].split('</think>') %}"
    "{{ m['role'] + ': ' + p[-1] + (p[0] + '</think>' if p | length > 1 else '') + '<|im_end|>' }}{% endfor %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
KEEPS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template; take prompt.style=tutorial"),
        (DROPS, "drops an answer's think block and opens none itself"),
        (MOVES, "moves an answer's think block away"),
        (ENDLESS, "ends an answer with no token of its own, so none would ever end"),
        (KEEPS + "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}", "closes the think block before"),
        (KEEPS.replace("m['content']", "m['content'] | upper"), "does not give the question once"),
        ("{{ raise_exception('no user') }}", "cannot be used"),
    ],
)
def test_a_template_that_does_not_fit_is_a_sentence(tmp_path, template, said):
    tokenizer = load_tokenizer(save_tokenizer("smollm2", tmp_path))
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=said) as caught:
        make_prompt_format("auto", tokenizer)
    assert str(caught.value).endswith(".")


def test_a_style_whose_tokens_the_model_lacks_is_a_sentence(form):
    with pytest.raises(ModelError, match="is no token of this model; take auto or chat"):
        make_prompt_format("native", form("qwen3"))
    with pytest.raises(ModelError, match="joins prompt and completion"):  # "<think>" + newline is one token less there
        check_training_text(form("llama-3.2"), *format_row(ROWS[0], make_prompt_format("tutorial", form("llama-3.2"))))


@pytest.mark.parametrize("name", FORMS)
def test_a_format_that_00_pinned_survives_config_yaml(form, name):
    import yaml

    found = make_prompt_format("chat", form(name))
    config = load_config("demo", {"prompt.format": found.model_dump()})
    assert find_format(config.prompt) == found
    assert yaml.safe_load(config.to_yaml())["prompt"]["format"] == found.model_dump()
    assert differing_settings(config) == {}  # it was found, not given


def test_before_00_the_text_of_a_chat_model_is_not_known():
    with pytest.raises(RunDirError, match="known once 00_setup has run"):
        format_prompt("Why?", load_config("demo", {"prompt.style": "chat"}).prompt)
    assert format_prompt("Why?", load_config("demo", {"prompt.style": "native"}).prompt) == format_prompt(
        "Why?", NATIVE
    )
