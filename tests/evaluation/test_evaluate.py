"""One model evaluated: loaded with room for all that it will be given."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from utils.data.prompts import format_row
from utils.errors import RunDirError
from utils.evaluation import generate as generation
from utils.evaluation.evaluate import evaluate_model, load_for_inference, read_evaluation
from utils.evaluation.workers import answer_share
from utils.files import write_json, write_lines
from utils.models import load as models_load
from utils.pipeline.run_dir import open_run
from utils.pipeline.stages import BY_NAME

LONG = "A man has " + "a dry cough and " * 400 + "a red rash. What is it?"


@pytest.fixture
def run(tiny_folder, tmp_path):
    """A run with one question that is longer than model.max_seq_length leaves room for."""
    settings = {"model.name": str(tiny_folder), "model.max_seq_length": 256, "generate.max_new_tokens": 300}
    run = open_run("demo", tmp_path / "run", settings)
    run.save()
    run.file("data").mkdir()
    row = {"id": "q", "Question": LONG, "Complex_CoT": "Hm.", "Response": "Gout.", "group": "g"}
    pd.DataFrame([row]).to_parquet(run.file("data/eval.parquet"))
    run.file("data/benchmark.jsonl").touch()
    write_json(run.file("data/anecdote.json"), {})
    return run


@pytest.fixture
def unsloth(monkeypatch, tiny_model):
    """A stub in unsloth's place that remembers with how much room the model was loaded."""
    rooms = []

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(max_seq_length, **_):
            rooms.append(max_seq_length)
            model = SimpleNamespace(device=tiny_model[0].device, eval=lambda: None, config=SimpleNamespace())
            model.generation_config = SimpleNamespace(max_length=8192)  # unsloth's own
            return model, None

        @staticmethod
        def for_inference(model):
            pass

    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    monkeypatch.setattr(models_load, "start_backend", lambda config: "unsloth")
    return rooms


def needed(run, tokenizer) -> int:
    prompt, _ = format_row({"Question": LONG, "Complex_CoT": "", "Response": ""}, "native")
    return len(tokenizer(f"{prompt}\n</think>\n\nThe answer is A")["input_ids"]) + run.config.generate.max_new_tokens


def test_the_model_is_loaded_with_room_for_the_longest_prompt_an_answer_and_the_cue(run, unsloth, tiny_model):
    """unsloth cuts at max_seq_length: the rounds' inputs and the forced letter's were longer, and cut without an error."""
    load_for_inference(run, "base")
    assert needed(run, tiny_model[1]) > 256 and unsloth[0] >= needed(run, tiny_model[1])


def test_no_limit_of_unsloths_stands_beside_the_new_tokens_asked_for(run, unsloth):
    """transformers would warn of two limits in every batch."""
    model, _ = load_for_inference(run, "base")
    assert unsloth and model.generation_config.max_length is None


def test_a_worker_loads_with_the_same_room(run, unsloth, tiny_model, monkeypatch):
    monkeypatch.setattr(generation, "answer_questions", lambda *_, **__: None)
    write_json(run.file("workers/baseline-1.json"), ["q"])
    answer_share(str(run.path), "base", 1)
    assert unsloth[0] >= needed(run, tiny_model[1])


def test_what_was_evaluated_is_read_back_without_a_model_and_not_asked_again(run, tiny_model, monkeypatch):
    stage = BY_NAME["01_baseline_inference"]
    with pytest.raises(RunDirError, match="01_baseline_inference has not run"):
        read_evaluation(run, "base")
    run.write_record(stage, settings=run.settings(stage), inputs={"data/eval.parquet": {"sha256": "0"}})
    options = {"A": "one", "B": "two"}
    items = [
        {
            "id": identifier,
            "benchmark": name,
            "question": "Which?",
            "options": options,
            "gold": "B",
            "group": identifier,
        }
        for identifier, name in (("z1", "medqa"), ("a1", "medmcqa"))
    ]
    write_lines(run.file("data/benchmark.jsonl"), items)
    found = evaluate_model(run, *tiny_model, "base")
    assert set(found.answers) == {"q", "z1", "a1"} == set(found.scored["id"])
    assert found.benchmarks == ("medqa", "medmcqa")  # as configured, not as the ids sort
    assert found.left_out == 1 and len(found.loss) == 0  # the one row is longer than model.max_seq_length
    monkeypatch.setattr(generation, "generate_batch", None)
    again = evaluate_model(run, *tiny_model, "base")
    pd.testing.assert_frame_equal(again.scored, found.scored)
