"""The prompt format of training as servers need it: a chat template, and a Modelfile for Ollama."""

import json

from utils.data.prompts import find_format, format_prompt
from utils.schema import GenerateSection, PromptFormat, PromptSection

Prompt = PromptSection | PromptFormat | str


def chat_template(style: Prompt, adds_bos: bool = True) -> str:
    """A Jinja chat template whose generation prompt is `format_prompt`; earlier turns lose their reasoning."""
    form = find_format(style)
    parts = (form.before, form.after.partition("<think>")[0], form.after, form.end)
    before, between, after, end = (json.dumps(part, ensure_ascii=False) for part in parts)
    return (
        f"{'{{ bos_token }}' if adds_bos else ''}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{{{{ {before} + message['content'] }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {between} + message['content'].split('</think>')[-1] + {end} }}}}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {after} }}}}{{% endif %}}"
    )


def chat_ids(tokenizer, question: str) -> list[int]:
    """What the tokenizer's chat template makes of one question, as token ids."""
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)


def prompt_ids(tokenizer, question: str, style: Prompt) -> list[int]:
    """What the model was trained on for one question, as token ids."""
    return tokenizer(format_prompt(question, style)).input_ids


def fit_chat_template(tokenizer, style: Prompt) -> None:
    """Keep the tokenizer's chat template where it gives the training prompt to the token, or would with a think block opened
    behind it; else replace it."""
    question, own = "What now?\n\nA. This  or\tthat", tokenizer.chat_template
    opened = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    for template in (own, f"{own}{opened}") if own else ():
        tokenizer.chat_template = template
        if chat_ids(tokenizer, question) == prompt_ids(tokenizer, question, style):
            return
    tokenizer.chat_template = chat_template(style, adds_bos=tokenizer("").input_ids == [tokenizer.bos_token_id])


def make_modelfile(file: str, style: Prompt, generate: GenerateSection, context: int) -> str:
    """An Ollama Modelfile for the GGUF `file`: training prompt, end token, and the sampling that was measured."""
    form = find_format(style)
    return f'''\
FROM ./{file}
TEMPLATE """{form.before}{{{{ .Prompt }}}}{form.after}{{{{ .Response }}}}{form.end}"""
PARAMETER stop "{form.end}"
PARAMETER temperature {generate.temperature if generate.do_sample else 0}
PARAMETER top_p {generate.top_p if generate.do_sample else 1.0}
PARAMETER num_predict {generate.max_new_tokens}
PARAMETER num_ctx {context}
'''
