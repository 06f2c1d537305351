"""Answers and likelihoods: a batch says what a single prompt says, nothing is generated twice, losses are exact."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from utils import generation
from utils.answers import Question, read_answers
from utils.errors import HardwareError
from utils.generation import answer_questions, completion_nll, tokenize_row
from utils.prompts import format_row
from utils.settings import GenerateSection

GREEDY = GenerateSection(max_new_tokens=12, batch_size=4, do_sample=False)
ROWS = [
    {
        "Question": f"A man has {'a dry cough and ' * i}a red rash.",
        "Complex_CoT": "It fits.\nYes " * (i + 1),
        "Response": "R",
    }
    for i in range(7)
]


def questions() -> list[Question]:
    return [Question(f"q{i}", "open", format_row(row, "native")[0]) for i, row in enumerate(ROWS)]


def table() -> pd.DataFrame:
    pairs = [format_row(row, "native") for row in ROWS]
    return pd.DataFrame(
        {"id": [f"q{i}" for i in range(7)], "prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]}
    )


def test_a_left_padded_batch_answers_as_single_prompts_do(tiny_model, tmp_path):
    model, tokenizer = tiny_model
    batched = answer_questions(model, tokenizer, questions(), GREEDY, tmp_path / "batched.jsonl", "arm")
    alone = GREEDY.model_copy(update={"batch_size": 1})
    single = answer_questions(model, tokenizer, questions(), alone, tmp_path / "single.jsonl", "arm")
    assert [a["text"] for a in batched] == [a["text"] for a in single]
    assert [a["id"] for a in batched] == [f"q{i}" for i in range(7)]


def test_nothing_is_generated_twice_and_a_torn_line_is_answered_again(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = tiny_model
    path = tmp_path / "answers.jsonl"
    first = answer_questions(model, tokenizer, questions(), GREEDY, path, "arm")
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:4]) + "\n" + lines[4][:30], encoding="utf-8")
    asked = []
    real = generation._generate
    monkeypatch.setattr(generation, "_generate", lambda *a: asked.extend(q.id for q in a[2]) or real(*a))
    again = answer_questions(model, tokenizer, questions(), GREEDY, path, "arm")
    kept = {json.loads(line)["id"] for line in lines[:4]}
    assert sorted(asked) == sorted({f"q{i}" for i in range(7)} - kept)
    assert [a["text"] for a in again] == [a["text"] for a in first]
    assert sorted(a["id"] for a in read_answers(path)) == [f"q{i}" for i in range(7)]


def test_another_arm_does_not_reuse_the_answers(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = tiny_model
    path = tmp_path / "answers.jsonl"
    answer_questions(model, tokenizer, questions(), GREEDY, path, "adapter one")
    asked = []
    real = generation._generate
    monkeypatch.setattr(generation, "_generate", lambda *a: asked.extend(a[2]) or real(*a))
    answer_questions(model, tokenizer, questions(), GREEDY, path, "adapter two")
    assert len(asked) == 7


def test_a_batch_that_does_not_fit_is_halved_and_loses_nothing(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = tiny_model
    sizes, real = [], generation._generate

    def small_memory(model, tokenizer, batch, config):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokenizer, batch, config)

    monkeypatch.setattr(generation, "_generate", small_memory)
    answers = answer_questions(model, tokenizer, questions(), GREEDY, tmp_path / "a.jsonl", "arm")
    assert len(answers) == 7 and sizes[:2] == [4, 2] and max(sizes[1:]) == 2


def test_a_single_question_that_does_not_fit_is_a_sentence(tiny_model, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "_generate", no_memory)
    with pytest.raises(HardwareError, match="max_new_tokens"):
        answer_questions(*tiny_model, questions(), GREEDY, tmp_path / "a.jsonl", "arm")


def test_the_same_seed_samples_the_same_answers(tiny_model, tmp_path):
    sampled = GREEDY.model_copy(update={"do_sample": True})
    first, second = (
        [a["text"] for a in answer_questions(*tiny_model, questions(), sampled, tmp_path / f"{i}.jsonl", "arm")]
        for i in range(2)
    )
    assert first == second


def test_a_row_is_bos_prompt_reasoning_response_eos_each_part_in_its_place(tiny_model):
    _, tokenizer = tiny_model
    prompt, completion = format_row({"Question": "Q?", "Complex_CoT": "Because.", "Response": "So it is."}, "native")
    row = tokenize_row(tokenizer, prompt, completion)
    assert row["part"] == sorted(row["part"])
    texts = {
        code: tokenizer.decode([i for i, p in zip(row["input_ids"], row["part"], strict=True) if p == code])
        for code in (0, 1, 2)
    }
    assert texts[0] == tokenizer.bos_token + prompt
    assert texts[1] == "Because.\n</think>" and texts[2] == "\n\nSo it is." + tokenizer.eos_token


def test_the_parts_loss_adds_up_to_what_transformers_computes(tiny_model):
    model, tokenizer = tiny_model
    nll = completion_nll(model, tokenizer, table(), max_length=4096)
    for i, row in enumerate(table().itertuples()):
        encoded = tokenize_row(tokenizer, row.prompt, row.completion)
        ids = torch.tensor([encoded["input_ids"]])
        labels = ids.clone()
        labels[0, [p == 0 for p in encoded["part"]]] = -100
        with torch.no_grad():
            mean = model(input_ids=ids, labels=labels).loss.item()
        counted = nll["reasoning_tokens"][i] + nll["response_tokens"][i]
        assert counted == sum(p > 0 for p in encoded["part"])
        assert (nll["reasoning_nll"][i] + nll["response_nll"][i]) / counted == pytest.approx(mean, rel=1e-5)


def test_a_row_beyond_the_limit_is_left_out_and_never_cut(tiny_model):
    model, tokenizer = tiny_model
    lengths = [len(tokenize_row(tokenizer, r.prompt, r.completion)["input_ids"]) for r in table().itertuples()]
    limit = sorted(lengths)[3]
    nll = completion_nll(model, tokenizer, table(), max_length=limit)
    assert list(nll["id"]) == [f"q{i}" for i, length in enumerate(lengths) if length <= limit]
