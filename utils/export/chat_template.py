"""The prompt format of training as others need it: a chat template, an Ollama Modelfile, command lines.

A server that wraps questions otherwise than training did loses part of what was learnt, without an error.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass

from utils.data.prompts import find_format, format_prompt
from utils.schema import GenerateSection, PromptFormat, PromptSection

Prompt = PromptSection | PromptFormat | str

_PROMPT, _RESPONSE = "{{ .Prompt }}", "{{ .Response }}"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for --max-lora-rank


def split_prompt(style: Prompt) -> tuple[str, str, str]:
    """What stands before the question, between question and reasoning, and the opened think block."""
    before, rest = format_prompt("\0", style).split("\0")
    think = rest.index("<think>")
    return before, rest[:think], rest[think:]


def chat_template(style: Prompt, adds_bos: bool = True) -> str:
    """A Jinja chat template whose generation prompt is `format_prompt`; for `native` it renders as DeepSeek's own does.

    Reasoning in earlier assistant turns is dropped, as in DeepSeek's. BOS stands first where the tokenizer adds it.
    """
    parts = (*split_prompt(style), find_format(style).end)
    before, between, think, end = (json.dumps(part, ensure_ascii=False) for part in parts)
    return (
        f"{'{{ bos_token }}' if adds_bos else ''}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}{{{{ {before} + message['content'] }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {between} + message['content'].split('</think>')[-1] + {end} }}}}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {between} + {think} }}}}{{% endif %}}"
    )


def chat_ids(tokenizer, question: str) -> list[int]:
    """What the tokenizer's chat template makes of one question, as token ids."""
    turn = [{"role": "user", "content": question}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False).input_ids


def prompt_ids(tokenizer, question: str, style: Prompt) -> list[int]:
    """What the model was trained on for one question, as token ids."""
    return tokenizer(format_prompt(question, style)).input_ids


def fit_chat_template(tokenizer, style: Prompt) -> None:
    """Keep the tokenizer's chat template where it gives the training prompt to the token, or would with a think block opened
    behind it; else replace it."""
    probe, own = "What now?\n\nA. This  or\tthat", tokenizer.chat_template
    opened = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    for template in (own, f"{own}{opened}") if own else ():
        tokenizer.chat_template = template
        if chat_ids(tokenizer, probe) == prompt_ids(tokenizer, probe, style):
            return
    tokenizer.chat_template = chat_template(style, adds_bos=tokenizer("").input_ids == [tokenizer.bos_token_id])


def write_modelfile(file: str, style: Prompt, generate: GenerateSection, context: int) -> str:
    """An Ollama Modelfile for the GGUF `file`: training prompt, end token, and the sampling that was measured.

    BOS is added by Ollama, as by the tokenizer. What follows .Response closes earlier turns; Ollama cuts there.
    """
    before, between, think = split_prompt(style)
    end = find_format(style).end
    lines = [
        f"FROM ./{file}",
        f'TEMPLATE """{before}{_PROMPT}{between}{think}{_RESPONSE}{end}"""',
        f'PARAMETER stop "{end}"',
        f"PARAMETER temperature {generate.temperature if generate.do_sample else 0}",
        f"PARAMETER top_p {generate.top_p if generate.do_sample else 1.0}",
        f"PARAMETER num_predict {generate.max_new_tokens}",
        f"PARAMETER num_ctx {context}",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says, as Ollama reads it."""

    source: str
    template: str
    parameters: dict[str, list[str]]


def read_modelfile(text: str) -> Modelfile:
    """Parse FROM, TEMPLATE in three quotation marks, and PARAMETER lines (ollama/ollama, parser/parser.go)."""
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    source = re.search(r"^FROM (\S+)$", text, re.MULTILINE)
    parameters: dict[str, list[str]] = {}
    for name, value in re.findall(r"^PARAMETER (\w+) (.+)$", text, re.MULTILINE):
        parameters.setdefault(name, []).append(value.strip('"'))
    return Modelfile(source.group(1) if source else "", template.group(1) if template else "", parameters)


def render_modelfile(modelfile: Modelfile, question: str) -> str:
    """The text that Ollama sends to the model for one question: everything before .Response (template/template.go)."""
    return modelfile.template.split(_RESPONSE)[0].replace(_PROMPT, question)


@dataclass(frozen=True)
class Served:
    """What the command lines of a card need to know. `base_id` is a Hub id, or a folder's name."""

    base_id: str
    base_revision: str | None
    rank: int
    style: Prompt
    generate: GenerateSection
    embedded: bool = False
    gguf: tuple[str, ...] = ()

    @property
    def sampling(self) -> str:
        """Arguments of model.generate."""
        generate = self.generate
        sampled = f", temperature={generate.temperature}, top_p={generate.top_p}" if generate.do_sample else ""
        return f"max_new_tokens={generate.max_new_tokens}, do_sample={generate.do_sample}{sampled}"


def transformers_lines(served: Served, kind: str) -> str:
    """Python that answers one question with the export in the current folder: `adapter` on its base, or `merged`."""
    revision = f", revision={served.base_revision!r}" if served.base_revision else ""
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    load = ['model = AutoModelForCausalLM.from_pretrained(here, dtype="auto", device_map="auto")']
    if kind == "adapter":
        imports.insert(0, "from peft import PeftModel")
        base_id = f"{served.base_id!r}"
        if served.embedded:
            imports.append("from utils.models.tiny import ensure_model  # in a checkout of the series")
            base_id = "str(ensure_model())"
        load = [
            f"base_id = {base_id}",
            f'base = AutoModelForCausalLM.from_pretrained(base_id{revision}, dtype="auto", device_map="auto")',
            "model = PeftModel.from_pretrained(base, here)",
        ]
    newline = "\n"
    return f"""\
{newline.join(imports)}

here = "."  # this folder, or the id of its repository on the Hub
{newline.join(load)}
tokenizer = AutoTokenizer.from_pretrained(here)
question = "Which vitamin does the skin make in sunlight?"
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": question}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
output = model.generate(**inputs, {served.sampling})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def vllm_lines(served: Served, kind: str) -> str:
    """Shell lines that serve the export in the current folder by vLLM and ask one question."""
    revision = f" --revision {served.base_revision}" if served.base_revision else ""
    rank = next((rank for rank in _RANKS if rank >= served.rank), _RANKS[-1])
    serve = {
        "adapter": (
            f"vllm serve {served.base_id}{revision} --enable-lora --max-lora-rank {rank} \\\n"
            "    --lora-modules medical=. --tokenizer . --chat-template chat_template.jinja"
        ),
        "merged": "vllm serve . --served-model-name medical",
    }[kind]
    body = {
        "model": "medical",
        "messages": [{"role": "user", "content": "Which vitamin does the skin make in sunlight?"}],
        "max_tokens": served.generate.max_new_tokens,
        "temperature": served.generate.temperature if served.generate.do_sample else 0,
    } | ({"top_p": served.generate.top_p} if served.generate.do_sample else {})
    return (
        f"{serve}\ncurl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d {shlex.quote(json.dumps(body))}\n"
    )


def llama_cpp_lines(served: Served) -> str:
    """Shell lines for llama.cpp, in the folder of the GGUF files; the prompt is written out, `\\n` and all."""
    prompt = format_prompt("Which vitamin does the skin make in sunlight?", served.style).replace("\n", "\\n")
    generate = served.generate
    sampling = f"--temp {generate.temperature} --top-p {generate.top_p}" if generate.do_sample else "--temp 0"
    line = f"llama-completion -m {served.gguf[-1]} -no-cnv -n {generate.max_new_tokens} {sampling} -p {shlex.quote(prompt)}"
    server = f"llama-server -m {served.gguf[-1]} --jinja  # its chat template gives the same prompt"
    return f"{line}\n{server}\n"


def ollama_lines() -> str:
    """Shell lines for Ollama, in the folder of the Modelfile."""
    return 'ollama create medical -f Modelfile\nollama run medical "Which vitamin does the skin make in sunlight?"\n'
