"""From a row to prompt and completion: plain strings, identical in training and at inference, no template engine in between.

The model's own chat template cuts assistant turns at `</think>`, which deletes the reasoning that we train on (TRL issue
6766). So 00 takes from it the text around one question, once (`utils.models.make_prompt_format`), and keeps it in
config.yaml. BOS is added by the tokenizer and the end token by the trainer: neither is ever written into a string here.
"""

from pathlib import Path

import yaml

from utils.errors import RunDirError
from utils.schema import PromptFormat, PromptSection

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|finetune_right_pad_id|>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

NATIVE = PromptFormat(
    style="native", before=USER, after=f"{ASSISTANT}<think>\n", lead="", close="\n</think>\n\n", end=EOS
)
_TUTORIAL = yaml.safe_load((Path(__file__).parent / "tutorial.yaml").read_text(encoding="utf-8"))
TUTORIAL = PromptFormat(style="tutorial", **_TUTORIAL["prompt"], end=EOS)
TUTORIAL_QUESTION = _TUTORIAL["question"]
_BY_STYLE = {"native": NATIVE, "tutorial": TUTORIAL}


def find_format(prompt: PromptFormat | PromptSection | str) -> PromptFormat:
    """The format that 00 found for a run's `config.prompt`, or that of a style which needs no tokenizer to be known.

    Raises RunDirError for `auto` and `chat` before 00.
    """
    if isinstance(prompt, PromptSection):
        prompt = prompt.format or prompt.style
    found = prompt if isinstance(prompt, PromptFormat) else _BY_STYLE.get(prompt)
    if found is None:
        raise RunDirError(f"prompt.style is {prompt}, and its text is known once 00_setup has run; run that first.")
    return found


def format_prompt(question: str, prompt: PromptFormat | PromptSection | str) -> str:
    """What the model is given at inference: everything up to the reasoning."""
    text = find_format(prompt)
    return f"{text.before}{question}{text.after}"


def format_completion(reasoning: str, response: str, prompt: PromptFormat | PromptSection | str) -> str:
    """What the model is to produce after `format_prompt`; prompt + completion is the training text.

    A row without reasoning closes the think block at once, since the prompt, which has opened it, is the same for every
    row and at inference. No newline comes before the `</think>` then: tokenizers would join it with the prompt's.
    """
    text = find_format(prompt)
    close = text.close if reasoning else text.close.lstrip()
    return f"{text.lead}{reasoning}{close}{response}"


def format_row(row: dict[str, str], prompt: PromptFormat | PromptSection | str) -> tuple[str, str]:
    """(prompt, completion) of a row with Question, Complex_CoT and Response."""
    return format_prompt(row["Question"], prompt), format_completion(row["Complex_CoT"], row["Response"], prompt)


def format_multiple_choice(question: str, options: dict[str, str]) -> str:
    """A multiple-choice question as one user turn that asks for an explicit letter."""
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    last = f'Think it through, then end with "The answer is X.", where X is one of {", ".join(options)}.'
    return f"{question}\n\n{lines}\n\n{last}"
