"""Answers and likelihoods: a batch says what a single prompt says, nothing is generated twice, losses are exact."""

from __future__ import annotations

import json

import pytest
import torch

from utils.data.prompts import format_row
from utils.errors import OutOfMemory
from utils.evaluation import generate as generation
from utils.evaluation.generate import answer_questions, share_path
from utils.evaluation.questions import Question
from utils.schema import GenerateSection
from utils.sealed import read_lines

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
    real = generation.generate_batch
    monkeypatch.setattr(generation, "generate_batch", lambda *a: asked.extend(p.question.id for p in a[2]) or real(*a))
    again = answer_questions(model, tokenizer, questions(), GREEDY, path, "arm")
    kept = {json.loads(line)["id"] for line in lines[:4]}
    assert sorted(asked) == sorted({f"q{i}" for i in range(7)} - kept)
    assert [a["text"] for a in again] == [a["text"] for a in first]
    assert sorted(a["id"] for a in read_lines(path)) == [f"q{i}" for i in range(7)]


def test_lines_that_are_dropped_are_kept_beside(tiny_model, tmp_path, capsys):
    """Answers without a seal, as versions before seals wrote them, and a torn line: hours of work are not deleted."""
    model, tokenizer = tiny_model
    path, kept = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.old"
    answer_questions(model, tokenizer, questions(), GREEDY, path, "arm")
    assert not kept.exists()
    sealed = path.read_bytes().splitlines(keepends=True)
    bare = [json.dumps({k: v for k, v in json.loads(line).items() if k != "seal"}).encode() + b"\n" for line in sealed]
    torn = sealed[6][:30]
    path.write_bytes(b"".join([*bare[:5], sealed[5], torn]))
    capsys.readouterr()
    answer_questions(model, tokenizer, questions(), GREEDY, path, "arm")
    told = capsys.readouterr().out
    assert "answers.jsonl holds 1 whole answers; the other 6 lines are kept in answers.jsonl.old" in told
    assert kept.read_bytes() == b"".join([*bare[:5], torn, b"\n"])
    path.write_bytes(path.read_bytes() + b"{}\n")
    answer_questions(model, tokenizer, questions(), GREEDY, path, "arm")
    assert kept.read_bytes().splitlines()[-2:] == [torn, b"{}"]  # added to, not replaced
    assert len(read_lines(path)) == 7


def test_a_helpers_damaged_lines_are_kept_beside_ours(tiny_model, tmp_path):
    model, tokenizer = tiny_model
    path = tmp_path / "answers.jsonl"
    share_path(path, 1).write_bytes(b'{"id": "q1"}\n{"id": "q2", "te')
    answer_questions(model, tokenizer, questions(), GREEDY, path, "arm")
    assert (tmp_path / "answers.jsonl.old").read_bytes() == b'{"id": "q1"}\n{"id": "q2", "te\n'
    assert not share_path(path, 1).exists() and len(read_lines(path)) == 7


def test_another_arm_does_not_reuse_the_answers(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = tiny_model
    path = tmp_path / "answers.jsonl"
    answer_questions(model, tokenizer, questions(), GREEDY, path, "adapter one")
    asked = []
    real = generation.generate_batch
    monkeypatch.setattr(generation, "generate_batch", lambda *a: asked.extend(a[2]) or real(*a))
    answer_questions(model, tokenizer, questions(), GREEDY, path, "adapter two")
    assert len(asked) == 7


def test_a_batch_that_does_not_fit_is_halved_and_loses_nothing(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = tiny_model
    sizes, real = [], generation.generate_batch

    def small_memory(model, tokenizer, batch, steps, config):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokenizer, batch, steps, config)

    monkeypatch.setattr(generation, "generate_batch", small_memory)
    answers = answer_questions(model, tokenizer, questions(), GREEDY, tmp_path / "a.jsonl", "arm")
    assert len(answers) == 7 and sizes[:2] == [4, 2] and max(sizes[1:]) == 2


def test_a_single_question_that_does_not_fit_is_a_sentence(tiny_model, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "generate_batch", no_memory)
    with pytest.raises(OutOfMemory, match="max_new_tokens"):
        answer_questions(*tiny_model, questions(), GREEDY, tmp_path / "a.jsonl", "arm")


@pytest.mark.parametrize("size", [1, 3, 7, "auto"])
def test_a_sampled_answer_does_not_depend_on_its_batch(tiny_model, tmp_path, size):
    sampled = GREEDY.model_copy(update={"do_sample": True, "temperature": 1.0, "max_new_tokens": 40})
    reference = answer_questions(*tiny_model, questions(), sampled, tmp_path / "reference.jsonl", "arm")
    other = sampled.model_copy(update={"batch_size": size})
    again = answer_questions(*tiny_model, questions()[::-1], other, tmp_path / "again.jsonl", "arm")
    assert [a["text"] for a in again][::-1] == [a["text"] for a in reference]
    assert len({a["text"] for a in reference}) > 3  # they are not one stream


def test_a_question_of_its_own_seed_and_id_draws_its_own_answer(tiny_model, tmp_path):
    sampled = GREEDY.model_copy(update={"do_sample": True, "temperature": 1.0})
    same = [Question(f"copy-{i}", "open", questions()[0].prompt) for i in range(3)]
    texts = [a["text"] for a in answer_questions(*tiny_model, same, sampled, tmp_path / "a.jsonl", "arm")]
    other = answer_questions(*tiny_model, same, sampled.model_copy(update={"seed": 1}), tmp_path / "b.jsonl", "arm")
    assert len(set(texts)) == 3 and texts != [a["text"] for a in other]


@pytest.mark.parametrize("sampled", [False, True])
def test_an_answer_over_several_rounds_is_the_answer_in_one(tiny_model, tmp_path, monkeypatch, sampled):
    config = GREEDY.model_copy(update={"max_new_tokens": 45, "do_sample": sampled, "batch_size": 3})
    whole = answer_questions(*tiny_model, questions(), config, tmp_path / "whole.jsonl", "arm")
    monkeypatch.setattr(generation, "ROUND_TOKENS", 10)
    rounds = answer_questions(*tiny_model, questions(), config, tmp_path / "rounds.jsonl", "arm")
    assert rounds == whole and all(answer["tokens"] <= 45 for answer in rounds)


def test_the_places_of_finished_answers_are_taken_by_others(tiny_model, tmp_path, monkeypatch):
    """Without rounds a batch lasts as long as its longest answer."""
    monkeypatch.setattr(generation, "ROUND_TOKENS", 4)
    eos, batches = tiny_model[1].eos_token_id, []

    def one_in_two_ends(model, tokenizer, batch, steps, config):
        batches.append([(p.question.id, len(p.generated)) for p in batch])
        return [[7] * (2 if int(p.question.id[1]) % 2 else steps) + [eos] * (int(p.question.id[1]) % 2) for p in batch]

    monkeypatch.setattr(generation, "generate_batch", one_in_two_ends)
    answers = answer_questions(*tiny_model, questions(), GREEDY, tmp_path / "a.jsonl", "arm")
    assert [a["tokens"] for a in answers] == [12, 3, 12, 3, 12, 3, 12]
    assert [a["finish_reason"] for a in answers] == ["length", "stop"] * 3 + ["length"]
    assert max(map(len, batches)) == 4 and all(len({done for _, done in batch}) == 1 for batch in batches)
    assert len(batches) < 7  # two batches of up to three rounds each, were none refilled, are six


def test_the_automatic_batch_follows_the_free_memory(tiny_model, tmp_path, monkeypatch):
    sizes, real = [], generation.generate_batch
    monkeypatch.setattr(generation, "sequences_that_fit", lambda model, prompt, new: 3)
    monkeypatch.setattr(generation, "generate_batch", lambda *a: sizes.append(len(a[2])) or real(*a))
    auto = GREEDY.model_copy(update={"batch_size": "auto"})
    answer_questions(*tiny_model, questions(), auto, tmp_path / "a.jsonl", "arm")
    assert sizes == [3, 3, 1]


def test_what_helpers_answered_is_joined_and_what_they_left_is_answered_here(tiny_model, tmp_path, monkeypatch):
    path, asked, real = tmp_path / "answers.jsonl", [], generation.generate_batch

    class OneOfTwo:
        def start(self, questions):
            self.theirs = questions[1::2]
            return questions[::2]

        def wait(self):
            done = self.theirs[:1]  # then it was killed
            answer_questions(*tiny_model, done, GREEDY, share_path(path, 1), "arm")

    monkeypatch.setattr(generation, "generate_batch", lambda *a: asked.extend(p.question.id for p in a[2]) or real(*a))
    answers = answer_questions(*tiny_model, questions(), GREEDY, path, "arm", helpers=OneOfTwo())
    alone = answer_questions(*tiny_model, questions(), GREEDY, tmp_path / "alone.jsonl", "arm")
    assert answers == alone and sorted(asked) == sorted(2 * [f"q{i}" for i in range(7)])
    assert list(tmp_path.glob("answers.*.jsonl")) == [] and len(read_lines(path)) == 7
