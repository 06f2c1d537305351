"""The letter probe: lm-evaluation-harness's log-likelihood of each option's letter, on the model that is loaded.

Optional (evaluate.probe), a measure of knowledge and not of reasoning; `probe_results` has the prompt and reads the file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from utils.errors import DataError, ModelError, PinError
from utils.evaluation.probe_results import current_probe, format_probe, probe_items, probe_key
from utils.evaluation.questions import arm_digest
from utils.files import write_text
from utils.pipeline.run_dir import RunDir
from utils.progress import Progress
from utils.sealed import to_lines

LM_EVAL = "lm_eval==0.4.13"  # optional: not among the pins that every run needs
_TOKENS = 2048  # in one forward pass; the harness holds two batches of float32 log-probabilities over 128k entries


def probe_letters(model, tokenizer, items: pd.DataFrame, path: Path, arm: str) -> pd.DataFrame:
    """Log-likelihood (nats) of each letter of every item, written to `path` (JSONL, an object for each item).

    `items` has id, question, options (dict of letter to text) and gold. Returns and writes, in their order: id, key (of
    arm, prompt and gold), letter (the likeliest), correct, and loglikelihoods (dict of letter to nats). Where `path`
    holds all of that for this `arm` already, it is read and nothing is computed. Weights, adapters, tokenizer and
    random state stay as they are; an active `disable_adapter` is respected.

    Raises PinError without lm_eval, DataError where an item is too long for the model, ModelError where a likelihood
    is not finite.
    """
    done = current_probe(path, items, arm)
    if done is not None:
        return done
    require_lm_eval()
    prompts = [format_probe(item.question, item.options) for item in items.itertuples()]
    longest = _longest(model, tokenizer, list(items["id"]), prompts)
    with Progress("probing letters", len(items), "item") as bar, _quiet():
        scores = _score(_harness(model, tokenizer, max(1, _TOKENS // longest), bar), items, prompts)
    rows = []
    for item, likelihoods in zip(items.itertuples(), scores, strict=True):
        if not all(math.isfinite(value) for value in likelihoods.values()):
            raise ModelError(
                f"Item {item.id}: a letter's log-likelihood is {list(likelihoods.values())}, expected finite figures; "
                "try another hardware.dtype, or leave evaluate.probe off."
            )
        letter = max(likelihoods, key=likelihoods.get)
        row = {"id": str(item.id), "key": probe_key(item.question, item.options, item.gold, arm), "letter": letter}
        rows.append({**row, "correct": letter == item.gold, "loglikelihoods": likelihoods})
    write_text(path, to_lines(rows))
    return pd.DataFrame(rows)


def probe_run(run: RunDir, model, tokenizer, arm: str) -> pd.DataFrame | None:
    """`probe_letters` over the items that 00 froze, into `ARM/probe.jsonl`; None unless evaluate.probe is on."""
    if not run.config.evaluate.probe:
        return None
    return probe_letters(model, tokenizer, probe_items(run), run.file(f"{arm}/probe.jsonl"), arm_digest(run, arm))


def require_lm_eval() -> None:
    """Raise PinError unless lm_eval is installed; cheap, so that a run can find out before it loads a model."""
    if importlib.util.find_spec("lm_eval") is None:
        raise PinError(
            f"evaluate.probe is on, but lm_eval is not installed; expected {LM_EVAL}: pip install {LM_EVAL}, or leave "
            "evaluate.probe off."
        )


def _longest(model, tokenizer, ids: list, prompts: list[str]) -> int:
    """Tokens of the longest prompt and its letter; raises DataError beyond the model's context.

    The harness would cut such a prompt on the left and score what is left.
    """
    lengths = [len(tokens) + 2 for tokens in tokenizer(prompts)["input_ids"]]  # a letter may take two tokens
    longest, limit = max(lengths), getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise DataError(
            f"Item {ids[lengths.index(longest)]} is {longest} tokens long, the model takes {limit}; "
            "take it out of the benchmark, or leave evaluate.probe off."
        )
    return longest


def _harness(model, tokenizer, batch_size: int, bar: Progress):
    """The model as lm-eval sees it: on its own device, as it is, never moved, converted or downloaded."""
    with _same_environment():
        import torch
        from lm_eval.models.huggingface import HFLM

    class Loaded(HFLM):
        def _model_call(self, inps, attn_mask=None, labels=None):
            # The call of `generation.completion_nll`: right-padded, without a mask and without a KV cache.
            with torch.inference_mode():
                logits = self.model(input_ids=inps, use_cache=False).logits
            # Letters of unequal token counts take a pass each, which is more passes than items.
            bar.update(min(len(inps), bar.total - bar.done))
            return logits

    return Loaded(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=True,  # as the tokenizer does in training and generation
        softmax_dtype="float32",  # in half precision, likelihoods of letters tie
    )


def _score(lm, items: pd.DataFrame, prompts: list[str]) -> list[dict[str, float]]:
    """{letter: nats} of each item, by lm_eval.evaluate over a task of our own: lm-eval's medqa_4options, any options.

    Not simple_evaluate, which does the same after it has reseeded every generator, indexed all its tasks (10 s) and
    run `pip list` and git for a report that nobody reads here.
    """
    with _same_environment():
        from datasets import Dataset
        from lm_eval import evaluate
        from lm_eval.api.task import ConfigurableTask

    documents = [
        {"prompt": prompt, "letters": list(item.options), "label": list(item.options).index(item.gold)}
        for item, prompt in zip(items.itertuples(), prompts, strict=True)
    ]
    task = ConfigurableTask(
        config={
            "task": "letter_probe",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},  # in memory: no Hub, no cache
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": lambda document: document["prompt"],
            "doc_to_choice": lambda document: document["letters"],
            "doc_to_target": lambda document: document["label"],
            "target_delimiter": " ",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    samples = evaluate(lm, {"tasks": {"letter_probe": task}}, bootstrap_iters=0, log_samples=True)["samples"]
    samples = sorted(samples["letter_probe"], key=lambda sample: sample["doc_id"])
    return [
        {letter: nats for letter, (nats, _) in zip(sample["doc"]["letters"], sample["filtered_resps"], strict=True)}
        for sample in samples
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back lm-eval's warnings about a model that is loaded already, and its three bars: `Progress` has its own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """lm_eval sets Hub variables as it is imported, which whatever is started later would inherit."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
