"""One model evaluated, the same way for the base and the tuned model: what it answers, and what it finds likely."""

from dataclasses import dataclass

import pandas as pd

from utils.data.prompts import format_row
from utils.data.rows import write_frame
from utils.errors import RunDirError
from utils.evaluation import loss as losses
from utils.evaluation.answer_parsing import CLOSE
from utils.evaluation.generate import answer_questions
from utils.evaluation.metrics import loss_per_token, rouge_l, score_answers
from utils.evaluation.questions import FOLDERS, Model, current_answers, load_questions, model_digest, read_forced
from utils.evaluation.workers import Workers
from utils.pipeline.run_dir import RunDir
from utils.pipeline.stages import BY_NAME

_SPARE_TOKENS = 32  # an answer's text, tokenised again, can take a few tokens more than were generated


@dataclass(frozen=True)
class Evaluation:
    """What one model said, and what it lost, as its files hold it.

    `answers` and `forced` letters go by id. `scored` has a row for each scored answer, `letters` one for each benchmark
    item (None unless asked for), sorted alike for both models. `loss` has nats per token (completion, reasoning,
    response) and group of each held-out row, by id; `left_out` counts those too long for it.
    """

    answers: dict[str, dict]
    forced: dict[str, str]
    scored: pd.DataFrame
    loss: pd.DataFrame
    left_out: int = 0
    benchmarks: tuple[str, ...] = ()  # as configured, evaluate.benchmark first
    letters: pd.DataFrame | None = None


def load_for_inference(run: RunDir, which: Model):
    """(model, tokenizer) ready to answer, with the adapter for `tuned`, and room for the longest answer."""
    from utils.models.load import load_model, ready_for_inference, start_backend
    from utils.models.tokenizer import load_tokenizer, model_source

    config = run.config
    start_backend(config)  # before the tokenizer, which imports transformers
    tokenizer = load_tokenizer(model_source(config), config.model.revision)
    prompts = [question.prompt for question in load_questions(run)[0]]
    if config.evaluate.letter_logprobs:
        items = losses.load_letter_items(run).itertuples()
        prompts += [losses.format_letter_prompt(item.question, item.options) for item in items]
    longest = max(len(tokenizer(f"{prompt}\n{CLOSE}\n\n{losses.CUE} X")["input_ids"]) for prompt in prompts)
    room = max(config.model.max_seq_length, longest + config.generate.max_new_tokens + _SPARE_TOKENS)
    adapter = run.file("training/adapter") if which == "tuned" else None
    model, tokenizer = load_model(config, adapter=adapter, max_seq_length=room)
    return ready_for_inference(model), tokenizer


def evaluate_model(run: RunDir, model, tokenizer, which: Model) -> Evaluation:
    """Ask a loaded model everything that is not on file yet, write its files, and read them back.

    Raises ModelError where `tuned` does not rest on the measured base, OutOfMemory where one question or row is too large,
    SessionOver where hardware.max_hours ends the answering.
    """
    config, folder, digest = run.config, run.file(FOLDERS[which]), model_digest(run, which)
    questions, held_out, benchmark = load_questions(run)
    pairs = [format_row(row, config.prompt) for row in held_out.to_dict("records")]
    rows = pd.DataFrame(pairs, columns=["prompt", "completion"]).assign(id=held_out["id"].to_numpy())
    if which == "tuned":
        deviation = losses.check_same_base(model, tokenizer, rows, pd.read_parquet(run.file("baseline/nll.parquet")))
        print(f"adapter switched off: at most {deviation:.4%} from the base's losses")
    with Workers(run, which) as workers:
        path, ends = folder / "answers.jsonl", config.hardware.max_hours
        ahead = " The fine-tuned model's may take as long; 03 tells its own time." if which == "base" else ""
        answers = answer_questions(model, tokenizer, questions, config.generate, path, digest, workers, ends, ahead)
    losses.forced_letters(model, tokenizer, questions, answers, benchmark, folder / "forced.jsonl")
    loss = losses.completion_loss(model, tokenizer, rows, config.model.max_seq_length)
    write_frame(folder / "nll.parquet", loss)
    if config.evaluate.letter_logprobs:
        losses.measure_letters(model, tokenizer, losses.load_letter_items(run), folder / "probe.jsonl", digest)
    return read_evaluation(run, which)


def read_evaluation(run: RunDir, which: Model) -> Evaluation:
    """What `evaluate_model` wrote, scored without a model; raises RunDirError where any of it is missing."""
    stage = "04_comparison" if which == "tuned" else "01_baseline_inference"
    if not run.record(BY_NAME[stage]).get("inputs"):
        raise RunDirError(f"{run.path} has no answers of both models yet: {stage} has not run; run the series to 04.")
    folder, digest = run.file(FOLDERS[which]), model_digest(run, which)
    questions, held_out, benchmark = load_questions(run)
    answers = current_answers(folder / "answers.jsonl", questions, run.config.generate, digest)
    forced = read_forced(folder / "forced.jsonl", answers, benchmark)
    scored = score_answers(answers, held_out, benchmark, forced)
    loss = loss_per_token(pd.read_parquet(folder / "nll.parquet")).sort_index()
    groups = held_out.get("group", held_out["id"]).fillna(held_out["id"]).set_axis(held_out["id"])
    asked, probe = run.config.evaluate.letter_logprobs, folder / "probe.jsonl"
    return Evaluation(
        answers=answers,
        forced=forced,
        scored=scored.assign(rouge_l=scored["id"].map(rouge_l(answers, held_out))),
        loss=loss.assign(group=groups.reindex(loss.index)),
        left_out=len(held_out) - len(loss),
        benchmarks=() if benchmark is None else tuple(benchmark["benchmark"].unique()),
        letters=losses.read_letters(losses.load_letter_items(run), probe, digest) if asked else None,
    )
