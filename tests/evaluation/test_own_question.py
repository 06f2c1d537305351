"""A question of the reader's own: both models answer under the run's conditions, and the run stays as it is."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from utils.data.prompts import format_prompt
from utils.errors import DataError, RunDirError
from utils.evaluation.generate import answer_questions
from utils.evaluation.own_question import ask, require_adapter
from utils.evaluation.questions import Question
from utils.pipeline.run_dir import open_run
from utils.pipeline.stages import BY_NAME

OWN = "A man has a dry cough and a red rash. What is it?"


@pytest.fixture
def run(tiny_folder, tmp_path):
    settings = {"model.name": str(tiny_folder), "generate.max_new_tokens": 24, "generate.do_sample": True}
    run = open_run("demo", tmp_path / "run", settings)
    run.save()
    return run


@pytest.fixture
def tuned(tiny_folder):
    """The tiny model with an adapter that changes what it says."""
    import torch
    from transformers import AutoModelForCausalLM

    from utils.models.tokenizer import load_tokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    lora = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(base, lora).eval(), load_tokenizer(tiny_folder)


def test_each_model_answers_as_it_does_when_it_is_measured(run, tuned, tmp_path, capsys):
    model, tokenizer = tuned
    ask(run, model, tokenizer, OWN)
    base, own = capsys.readouterr().out.partition("--- base ---\n")[2].split("--- fine-tuned ---\n")
    question = Question("own", "open", format_prompt(OWN, run.config.prompt))
    (measured,) = answer_questions(model, tokenizer, [question], run.config.generate, tmp_path / "tuned.jsonl", "tuned")
    with model.disable_adapter():
        (before,) = answer_questions(model, tokenizer, [question], run.config.generate, tmp_path / "b.jsonl", "base")
    shown = [
        tokenizer.decode(tokenizer(one["text"])["input_ids"], skip_special_tokens=True) for one in (before, measured)
    ]
    assert [base.rstrip("\n"), own.rstrip("\n")] == [text.rstrip("\n") for text in shown] and base != own


def test_a_question_that_leaves_no_room_for_an_answer_is_a_sentence(run, tuned):
    model, tokenizer = tuned
    with pytest.raises(DataError, match=r"The question takes .* tokens .* room for 4,072; ask a shorter one"):
        ask(run, model, tokenizer, "a dry cough " * 2000)
    model.max_seq_length = 40  # as unsloth notes it, which cuts what is longer
    with pytest.raises(DataError, match="room for 16"):
        ask(run, model, tokenizer, OWN)


def test_a_run_without_an_adapter_is_a_sentence_and_a_stale_or_damaged_adapter_too(run, monkeypatch):
    with pytest.raises(RunDirError, match="has no adapter yet: 03_lora_training has not run"):
        require_adapter(run)
    file = run.file("training/adapter/adapter_model.safetensors")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"other")
    outputs = {"training/adapter/adapter_model.safetensors": {"sha256": "0" * 64}}
    run.write_record(BY_NAME["03_lora_training"], state="done", outputs=outputs)
    monkeypatch.setattr(type(run), "out_of_date", lambda self, stage: f"{stage.name} is out of date")
    with pytest.raises(
        RunDirError, match=r"03_lora_training is out of date; its adapter is not the one that config.yaml describes"
    ):
        require_adapter(run)
    monkeypatch.setattr(type(run), "out_of_date", lambda self, stage: None)
    with pytest.raises(RunDirError, match="differs from what 03_lora_training wrote"):
        require_adapter(run)
