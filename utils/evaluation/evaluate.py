"""One model evaluated, the same way for the base and the tuned model: what it answers, and what it finds likely."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from utils.data.prompts import format_row
from utils.data.rows import write_frame
from utils.errors import StageOrderError
from utils.evaluation.answer_parsing import CLOSE
from utils.evaluation.generate import answer_questions
from utils.evaluation.loss import (
    CUE,
    check_same_base,
    completion_loss,
    forced_letters,
    format_letter_prompt,
    load_letter_items,
    measure_letters,
    read_letters,
)
from utils.evaluation.metrics import loss_per_token, rouge_l, score_answers
from utils.evaluation.questions import FOLDERS, Model, current_answers, load_questions, model_digest, read_forced
from utils.evaluation.workers import Workers
from utils.pipeline.run_dir import RunDir
from utils.pipeline.stages import BY_NAME

_SPARE_TOKENS = 32  # an answer's text, tokenised again, can take a few tokens more than were generated
_STAGES = {"base": "01_baseline_inference", "tuned": "04_comparison"}


@dataclass(frozen=True)
class Evaluation:
    """What one model said, and what it lost, as its files hold it.

    `answers` and `forced` letters go by id. `scored` has a row for each scored answer, `letters` one for each benchmark
    item (None unless asked for), both sorted alike for both models. `loss` has nats per token (completion, reasoning,
    response) and group of each held-out row, by id; those that are too long for a loss are counted in `left_out`.
    `benchmarks` are in the order of the configuration, evaluate.benchmark first.
    """

    answers: dict[str, dict]
    forced: dict[str, str]
    scored: pd.DataFrame
    loss: pd.DataFrame
    left_out: int = 0
    benchmarks: tuple[str, ...] = ()
    letters: pd.DataFrame | None = None


def load_for_inference(run: RunDir, which: Model):
    """(model, tokenizer): the base model, with the trained adapter on it for `tuned`, ready to answer.

    It is loaded with room for the longest prompt, a whole answer and the cue after it: unsloth cuts what is longer,
    without an error, and letters were read in mid-reasoning (unsloth issue 2558).
    """
    from utils.models.load import load_model, ready_for_inference, start_backend

    start_backend(run.config)  # before the tokenizer, which imports transformers
    adapter = run.file("training/adapter") if which == "tuned" else None
    model, tokenizer = load_model(run.config, adapter=adapter, max_seq_length=longest_input(run))
    return ready_for_inference(model), tokenizer


def longest_input(run: RunDir) -> int:
    """Tokens of the longest text that the model is given while it is measured; at least model.max_seq_length."""
    from utils.models.tokenizer import load_tokenizer, model_source

    config = run.config
    tokenizer = load_tokenizer(model_source(config), config.model.revision)
    prompts = [question.prompt for question in load_questions(run)[0]]
    if config.evaluate.letter_logprobs:
        prompts += [format_letter_prompt(item.question, item.options) for item in load_letter_items(run).itertuples()]
    longest = max((len(tokenizer(prompt)["input_ids"]) for prompt in prompts), default=0)
    cue = len(tokenizer(f"\n{CLOSE}\n\n{CUE} X")["input_ids"])
    return max(config.model.max_seq_length, longest + config.generate.max_new_tokens + cue + _SPARE_TOKENS)


def evaluate_model(run: RunDir, model, tokenizer, which: Model) -> Evaluation:
    """Ask a loaded model everything, write its files, and read them back; what is on file already is not asked again.

    Raises ModelError where `tuned` does not rest on the base that was measured, OutOfMemory where one question or row
    does not fit.
    """
    config, folder, digest = run.config, run.file(FOLDERS[which]), model_digest(run, which)
    questions, held_out, benchmark = load_questions(run)
    pairs = [format_row(row, config.prompt) for row in held_out.to_dict("records")]
    rows = pd.DataFrame({"id": held_out["id"], "prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
    if which == "tuned":
        deviation = check_same_base(model, tokenizer, rows, pd.read_parquet(run.file("baseline/nll.parquet")))
        print(f"adapter switched off: at most {deviation:.4%} from the base's losses")
    with Workers(run, which) as workers:
        path = folder / "answers.jsonl"
        answers = answer_questions(model, tokenizer, questions, config.generate, path, digest, helpers=workers)
    forced_letters(model, tokenizer, questions, answers, benchmark, folder / "forced.jsonl")
    write_frame(folder / "nll.parquet", completion_loss(model, tokenizer, rows, config.model.max_seq_length))
    if config.evaluate.letter_logprobs:
        measure_letters(model, tokenizer, load_letter_items(run), folder / "probe.jsonl", digest)
    return read_evaluation(run, which)


def read_evaluation(run: RunDir, which: Model) -> Evaluation:
    """What `evaluate_model` wrote, scored; no model is needed.

    Raises StageOrderError where the model has not been evaluated, or answers, letters or losses are missing.
    """
    if not run.record(BY_NAME[_STAGES[which]]).get("inputs"):
        raise StageOrderError(
            f"{run.path} has no answers of both models yet: {_STAGES[which]} has not run; run the series to 04."
        )
    folder, digest = run.file(FOLDERS[which]), model_digest(run, which)
    questions, held_out, benchmark = load_questions(run)
    answers = current_answers(folder / "answers.jsonl", questions, run.config.generate, digest)
    forced = read_forced(folder / "forced.jsonl", answers, benchmark)
    scored = score_answers(answers, held_out, benchmark, forced)
    loss = loss_per_token(pd.read_parquet(folder / "nll.parquet")).sort_index()
    groups = held_out.get("group", held_out["id"]).fillna(held_out["id"]).set_axis(held_out["id"])
    asked = run.config.evaluate.letter_logprobs
    return Evaluation(
        answers=answers,
        forced=forced,
        scored=scored.assign(rouge_l=scored["id"].map(rouge_l(answers, held_out))),
        loss=loss.assign(group=groups.reindex(loss.index)),
        left_out=len(held_out) - len(loss),
        benchmarks=() if benchmark is None else tuple(dict.fromkeys(benchmark["benchmark"])),
        letters=read_letters(load_letter_items(run), folder / "probe.jsonl", digest) if asked else None,
    )
