"""From a row to prompt and completion: two formats, one string pair, no template engine in between.

The model's own chat template cuts assistant turns at `</think>`, which deletes the reasoning that we train on
(TRL issue 6766). So prompts are plain strings, identical in training and at inference. BOS is added by the tokenizer
and EOS by the trainer: neither is ever written into a string here.
"""

from __future__ import annotations

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|finetune_right_pad_id|>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

# The tutorial's text, letter for letter, trailing spaces included.
_TUTORIAL = (
    "Below is an instruction that describes a task, paired with an input that provides further context. \n"
    "Write a response that appropriately completes the request. \n"
    "Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a "
    "logical and accurate response.\n\n"
    "### Instruction:\n"
    "You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning. \n"
    "Please answer the following medical question. \n\n"
    "### Question:\n{question}\n\n"
    "### Response:\n<think>"
)
STYLES = ("native", "tutorial")


def format_prompt(question: str, style: str) -> str:
    """What the model is given at inference: everything up to the reasoning.

    `native` is DeepSeek's chat format with the opened think block that its generation prompt ends in; `tutorial` is
    the published instruction template, which ends in `<think>` without a newline.
    """
    if style == "native":
        return f"{USER}{question}{ASSISTANT}<think>\n"
    return _TUTORIAL.replace("{question}", question)


def format_completion(reasoning: str, response: str, style: str) -> str:
    """What the model is to produce after `format_prompt`; prompt + completion is the training text."""
    if style == "native":
        return f"{reasoning}\n</think>\n\n{response}"
    return f"\n{reasoning}\n</think>\n{response}"


def format_row(row: dict[str, str], style: str) -> tuple[str, str]:
    """(prompt, completion) of a row with Question, Complex_CoT and Response."""
    return format_prompt(row["Question"], style), format_completion(row["Complex_CoT"], row["Response"], style)


def format_multiple_choice(question: str, options: dict[str, str]) -> str:
    """A multiple-choice question as one user turn that asks for an explicit letter."""
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    last = f'Think it through, then end with "The answer is X.", where X is one of {", ".join(options)}.'
    return f"{question}\n\n{lines}\n\n{last}"
