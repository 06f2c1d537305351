"""A question of the reader's own, put to both models, whose answers are printed as they come; a run stays as it is."""

from utils.data.prompts import format_prompt
from utils.errors import DataError, RunDirError
from utils.evaluation.generate import Pending, generate_batch
from utils.evaluation.questions import Question
from utils.pipeline.run_dir import RunDir, require_recorded
from utils.pipeline.stages import BY_NAME
from utils.schema import EMBEDDED


def ask(run: RunDir, model, tokenizer, question: str, max_new_tokens: int | None = None) -> None:
    """Print what the base (adapter off) and the fine-tuned model (adapter on) answer, under the run's conditions.

    Prompt format, decoding, random numbers and, unless `max_new_tokens` says otherwise, the cap are those of the measured
    answers; (model, tokenizer) come from `load_for_inference(run, "tuned")`. Raises DataError where the model has no room for the question and an answer.
    """
    from transformers import TextStreamer

    prompt, cap = format_prompt(question, run.config.prompt), max_new_tokens or run.config.generate.max_new_tokens
    ids = tokenizer(prompt)["input_ids"]
    room = getattr(model, "max_seq_length", model.config.max_position_embeddings) - cap  # unsloth cuts what is longer
    if len(ids) > room:
        found = f"The question takes {len(ids):,} tokens with its prompt"
        raise DataError(f"{found}, and beside an answer of {cap:,} the model has room for {room:,}; ask a shorter one.")
    embedded = run.config.model.name == EMBEDDED
    print("No medical advice." + " The demo's model was taught invented conditions, and answers with them." * embedded)

    def answer(title: str) -> None:
        print(f"--- {title} ---")
        pending = Pending(Question("own", "open", prompt), ids)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate_batch(model, tokenizer, [pending], cap, run.config.generate, streamer)

    with model.disable_adapter():
        answer("base")
    answer("fine-tuned")


def require_adapter(run: RunDir) -> None:
    """Raise RunDirError unless the run holds a trained adapter, as 03 wrote it."""
    if run.record(BY_NAME["03_lora_training"]).get("state") != "done":
        raise RunDirError(f"{run.path} has no adapter yet: 03_lora_training has not run; run the series to 03.")
    if stale := run.out_of_date(BY_NAME["03_lora_training"]):
        raise RunDirError(f"{stale}; its adapter is not the one that config.yaml describes: run the series to 03.")
    require_recorded(run.path, ("training/adapter",))
