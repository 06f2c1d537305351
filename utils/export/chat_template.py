"""The prompt format of training as servers need it: a chat template, and a Modelfile for Ollama.

A server that wraps questions otherwise than training did loses part of what was learnt, without an error.
"""

from __future__ import annotations

import json

from utils.data.prompts import EOS, format_prompt
from utils.schema import GenerateSection


def split_prompt(style: str) -> tuple[str, str, str]:
    """What stands before the question, between question and reasoning, and the opened think block."""
    before, rest = format_prompt("\0", style).split("\0")
    think = rest.index("<think>")
    return before, rest[:think], rest[think:]


def chat_template(style: str) -> str:
    """A Jinja chat template whose generation prompt is `format_prompt`; for `native` it renders as DeepSeek's own does.

    Reasoning in earlier assistant turns is dropped, as in DeepSeek's.
    """
    before, between, think = (json.dumps(part, ensure_ascii=False) for part in split_prompt(style))
    return (
        "{{ bos_token }}{% for message in messages %}"
        f"{{% if message['role'] == 'user' %}}{{{{ {before} + message['content'] }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {between} + message['content'].split('</think>')[-1] + {json.dumps(EOS, ensure_ascii=False)} }}}}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {between} + {think} }}}}{{% endif %}}"
    )


def chat_ids(tokenizer, question: str) -> list[int]:
    """What the tokenizer's chat template makes of one question, as token ids."""
    turn = [{"role": "user", "content": question}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False).input_ids


def prompt_ids(tokenizer, question: str, style: str) -> list[int]:
    """What the model was trained on for one question, as token ids."""
    return tokenizer(format_prompt(question, style)).input_ids


def fit_chat_template(tokenizer, style: str) -> None:
    """Keep the tokenizer's chat template where it gives the training prompt to the token, else replace it."""
    question = "What now?\n\nA. This  or\tthat"
    if tokenizer.chat_template is None or chat_ids(tokenizer, question) != prompt_ids(tokenizer, question, style):
        tokenizer.chat_template = chat_template(style)


def make_modelfile(file: str, style: str, generate: GenerateSection, context: int) -> str:
    """An Ollama Modelfile for the GGUF `file`: training prompt, end token, and the sampling that was measured.

    BOS is added by Ollama, as by the tokenizer. What follows .Response closes earlier turns; Ollama cuts there.
    """
    before, between, think = split_prompt(style)
    return f'''\
FROM ./{file}
TEMPLATE """{before}{{{{ .Prompt }}}}{between}{think}{{{{ .Response }}}}{EOS}"""
PARAMETER stop "{EOS}"
PARAMETER temperature {generate.temperature if generate.do_sample else 0}
PARAMETER top_p {generate.top_p if generate.do_sample else 1.0}
PARAMETER num_predict {generate.max_new_tokens}
PARAMETER num_ctx {context}
'''
