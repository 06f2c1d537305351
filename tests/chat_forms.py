"""Tiny tokenizers in the forms of chat models that people bring: their special tokens, chat templates and way with BOS."""

from __future__ import annotations

from utils.data.prompts import ASSISTANT, BOS, EOS, USER
from utils.data.synthetic import base_rows
from utils.models.tiny import CHAT_TEMPLATE

# Llama 3's and Qwen's way of cutting text: a sign and the newlines behind it are one piece.
_CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
_QWEN3 = (
    "{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{- '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n' }}{%- else %}"
    "{%- set parts = message['content'].split('</think>') %}"
    "{%- if parts | length > 1 and loop.last %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + parts[0].split('<think>')[-1].strip('\\n') + '\\n</think>\\n\\n' }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    "{{- parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
_SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PAD = "<|finetune_right_pad_id|>"
FORMS = {  # name: (special tokens, plain added ones, bos, eos, pad, how BOS is added, template)
    "deepseek-llama": ([BOS, EOS, USER, ASSISTANT, _PAD], ["<think>", "</think>"], BOS, EOS, _PAD, "always", CHAT_TEMPLATE),
    "r1-distill-qwen": ([BOS, EOS, USER, ASSISTANT], ["<think>", "</think>"], BOS, EOS, EOS, "flag", CHAT_TEMPLATE),
    "llama-3.2": (
        ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", _PAD],
        [], "<|begin_of_text|>", "<|eot_id|>", _PAD, "always", _LLAMA,
    ),
    "qwen3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>"], None, "<|im_end|>", "<|endoftext|>", "never", _QWEN3,
    ),
    "smollm2": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        [], "<|im_start|>", "<|im_end|>", "<|im_end|>", "never", _SMOL,
    ),
}  # fmt: skip


def save_tokenizer(form: str, folder, **changed):
    """The tokenizer of this form, saved in `folder` as its models have it; `changed` are its arguments (eos_token=...)."""
    import json

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special, plain, bos, eos, pad, adds_bos, template = FORMS[form]
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_CUT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text + ">\n" for row in base_rows(300) for text in row.values()), trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if adds_bos == "always":
        token = (bos, backend.token_to_id(bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[token])
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad} | changed
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=8192, **names)
    tokenizer.add_tokens(plain)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if adds_bos == "flag":
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": True}))
    return folder
