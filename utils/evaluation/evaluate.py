"""One model evaluated: loaded with room for what it will be asked, the same way for the base and the tuned model."""

from __future__ import annotations

from typing import Literal

from utils.evaluation.answer_parsing import CLOSE
from utils.evaluation.loss import CUE
from utils.evaluation.questions import load_questions
from utils.models.load import load_model, ready_for_inference, start_backend
from utils.models.tokenizer import load_tokenizer, model_source
from utils.pipeline.run_dir import RunDir

Model = Literal["base", "tuned"]
_SPARE_TOKENS = 32  # an answer's text, tokenised again, can take a few tokens more than were generated


def load_for_inference(run: RunDir, which: Model):
    """(model, tokenizer): the base model, with the trained adapter on it for `tuned`, ready to answer.

    It is loaded with room for the longest prompt, a whole answer and the cue after it: unsloth cuts what is longer,
    without an error, and letters were read in mid-reasoning (unsloth issue 2558).
    """
    start_backend(run.config)  # before the tokenizer, which imports transformers
    adapter = run.file("training/adapter") if which == "tuned" else None
    model, tokenizer = load_model(run.config, adapter=adapter, max_seq_length=longest_input(run))
    return ready_for_inference(model), tokenizer


def longest_input(run: RunDir) -> int:
    """Tokens of the longest text that the model is given while it is measured; at least model.max_seq_length."""
    config = run.config
    tokenizer = load_tokenizer(model_source(config), config.model.revision)
    prompts = [question.prompt for question in load_questions(run)[0]]
    cue = len(tokenizer(f"\n{CLOSE}\n\n{CUE} X")["input_ids"])
    longest = max((len(ids) for ids in tokenizer(prompts)["input_ids"]), default=0) if prompts else 0
    return max(config.model.max_seq_length, longest + config.generate.max_new_tokens + cue + _SPARE_TOKENS)
