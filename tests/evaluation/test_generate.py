"""Answers: a batch says what a single prompt says, nothing is generated twice, each question draws from its own stream."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from scipy import stats

from utils.data.prompts import format_row
from utils.errors import ModelError, OutOfMemory, SessionOver
from utils.evaluation import generate as generation
from utils.evaluation.generate import (
    answer_questions,
    check_batching,
    expected_tokens,
    generate_batch,
    question_stream,
    sampling_processors,
    share_path,
)
from utils.evaluation.questions import Question
from utils.files import append_lines, read_lines
from utils.schema import GenerateSection

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
    batched = answer_questions(model, tokenizer, questions(), GREEDY, tmp_path / "batched.jsonl", "model")
    alone = GREEDY.model_copy(update={"batch_size": 1})
    single = answer_questions(model, tokenizer, questions(), alone, tmp_path / "single.jsonl", "model")
    assert [a["text"] for a in batched] == [a["text"] for a in single]
    assert [a["id"] for a in batched] == [f"q{i}" for i in range(7)]


def test_nothing_is_generated_twice_and_a_torn_line_is_answered_again(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = tiny_model
    path = tmp_path / "answers.jsonl"
    first = answer_questions(model, tokenizer, questions(), GREEDY, path, "model")
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:4]) + "\n" + lines[4][:30], encoding="utf-8")
    asked = []
    real = generation.generate_batch
    monkeypatch.setattr(generation, "generate_batch", lambda *a: asked.extend(p.question.id for p in a[2]) or real(*a))
    again = answer_questions(model, tokenizer, questions(), GREEDY, path, "model")
    kept = {json.loads(line)["id"] for line in lines[:4]}
    assert sorted(asked) == sorted({f"q{i}" for i in range(7)} - kept)
    assert [a["text"] for a in again] == [a["text"] for a in first]
    assert sorted(a["id"] for a in read_lines(path)) == [f"q{i}" for i in range(7)]


def test_another_model_does_not_reuse_the_answers(tiny_model, tmp_path, monkeypatch):
    model, tokenizer = tiny_model
    path = tmp_path / "answers.jsonl"
    answer_questions(model, tokenizer, questions(), GREEDY, path, "adapter one")
    asked = []
    real = generation.generate_batch
    monkeypatch.setattr(generation, "generate_batch", lambda *a: asked.extend(a[2]) or real(*a))
    answer_questions(model, tokenizer, questions(), GREEDY, path, "adapter two")
    assert len(asked) == 7


def test_a_batch_that_does_not_fit_becomes_a_fifth_smaller_until_it_fits_and_loses_nothing(
    tiny_model, tmp_path, monkeypatch
):
    model, tokenizer = tiny_model
    sizes, real = [], generation.generate_batch

    def small_memory(model, tokenizer, batch, steps, config):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokenizer, batch, steps, config)

    monkeypatch.setattr(generation, "generate_batch", small_memory)
    answers = answer_questions(model, tokenizer, questions(), GREEDY, tmp_path / "a.jsonl", "model")
    assert len(answers) == 7 and sizes[:3] == [4, 3, 2] and max(sizes[2:]) == 2


def test_only_the_round_in_which_a_batch_did_not_fit_takes_smaller_ones(tiny_model, tmp_path, monkeypatch):
    sizes, real = [], generation.generate_batch

    def small_memory_for_long_answers(model, tokenizer, batch, steps, config):
        sizes.append((len(batch[0].generated), len(batch)))
        if len(batch) > 1 and batch[0].generated:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokenizer, batch, steps, config)

    monkeypatch.setattr(generation, "ROUND_TOKENS", 4)
    monkeypatch.setattr(generation, "generate_batch", small_memory_for_long_answers)
    few = GREEDY.model_copy(update={"batch_size": 3, "max_new_tokens": 8})
    assert len(answer_questions(*tiny_model, questions(), few, tmp_path / "a.jsonl", "model")) == 7
    failed = sizes.index((4, 3))
    assert (0, 3) in sizes[failed:] and sizes.count((4, 3)) == 1


def test_a_single_question_that_does_not_fit_is_a_sentence(tiny_model, tmp_path, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generation, "generate_batch", no_memory)
    with pytest.raises(OutOfMemory, match="max_new_tokens"):
        answer_questions(*tiny_model, questions(), GREEDY, tmp_path / "a.jsonl", "model")


@pytest.mark.parametrize("size", [1, 3, 7, "auto"])
def test_a_sampled_answer_does_not_depend_on_its_batch(tiny_model, tmp_path, size):
    sampled = GREEDY.model_copy(update={"do_sample": True, "temperature": 1.0, "max_new_tokens": 40})
    reference = answer_questions(*tiny_model, questions(), sampled, tmp_path / "reference.jsonl", "model")
    other = sampled.model_copy(update={"batch_size": size})
    again = answer_questions(*tiny_model, questions()[::-1], other, tmp_path / "again.jsonl", "model")
    assert [a["text"] for a in again][::-1] == [a["text"] for a in reference]
    assert len({a["text"] for a in reference}) > 3  # they are not one stream


def test_a_question_of_its_own_seed_and_id_draws_its_own_answer(tiny_model, tmp_path):
    sampled = GREEDY.model_copy(update={"do_sample": True, "temperature": 1.0})
    same = [Question(f"copy-{i}", "open", questions()[0].prompt) for i in range(3)]
    texts = [a["text"] for a in answer_questions(*tiny_model, same, sampled, tmp_path / "a.jsonl", "model")]
    other = answer_questions(*tiny_model, same, sampled.model_copy(update={"seed": 1}), tmp_path / "b.jsonl", "model")
    assert len(set(texts)) == 3 and texts != [a["text"] for a in other]


@pytest.mark.parametrize("sampled", [False, True])
def test_an_answer_over_several_rounds_is_the_answer_in_one(tiny_model, tmp_path, monkeypatch, sampled):
    config = GREEDY.model_copy(update={"max_new_tokens": 45, "do_sample": sampled, "batch_size": 3})
    whole = answer_questions(*tiny_model, questions(), config, tmp_path / "whole.jsonl", "model")
    monkeypatch.setattr(generation, "ROUND_TOKENS", 10)
    rounds = answer_questions(*tiny_model, questions(), config, tmp_path / "rounds.jsonl", "model")
    assert rounds == whole and all(answer["tokens"] <= 45 for answer in rounds)


def test_the_places_of_finished_answers_are_taken_by_others(tiny_model, tmp_path, monkeypatch):
    """Without rounds a batch lasts as long as its longest answer."""
    monkeypatch.setattr(generation, "ROUND_TOKENS", 4)
    eos, batches = tiny_model[1].eos_token_id, []

    def one_in_two_ends(model, tokenizer, batch, steps, config):
        batches.append([(p.question.id, len(p.generated)) for p in batch])
        return [[7] * (2 if int(p.question.id[1]) % 2 else steps) + [eos] * (int(p.question.id[1]) % 2) for p in batch]

    monkeypatch.setattr(generation, "generate_batch", one_in_two_ends)
    answers = answer_questions(*tiny_model, questions(), GREEDY, tmp_path / "a.jsonl", "model")
    assert [a["tokens"] for a in answers] == [12, 3, 12, 3, 12, 3, 12]
    assert [a["finish_reason"] for a in answers] == ["length", "stop"] * 3 + ["length"]
    assert max(map(len, batches)) == 4 and all(len({done for _, done in batch}) == 1 for batch in batches)
    assert len(batches) < 7  # two batches of up to three rounds each, were none refilled, are six


def test_the_automatic_batch_follows_the_free_memory(tiny_model, tmp_path, monkeypatch):
    sizes, real = [], generation.generate_batch
    monkeypatch.setattr(generation, "sequences_that_fit", lambda model, prompt, new: 3)
    monkeypatch.setattr(generation, "generate_batch", lambda *a: sizes.append(len(a[2])) or real(*a))
    auto = GREEDY.model_copy(update={"batch_size": "auto"})
    answer_questions(*tiny_model, questions(), auto, tmp_path / "a.jsonl", "model")
    assert sizes == [3, 3, 1]


def test_what_helpers_answered_is_joined_and_what_they_left_is_answered_here(tiny_model, tmp_path, monkeypatch):
    path, asked, real = tmp_path / "answers.jsonl", [], generation.generate_batch

    class OneOfTwo:
        def start(self, questions):
            self.theirs = questions[1::2]
            return questions[::2]

        def wait(self):
            done = self.theirs[:1]  # then it was killed
            answer_questions(*tiny_model, done, GREEDY, share_path(path, 1), "model")

    monkeypatch.setattr(generation, "generate_batch", lambda *a: asked.extend(p.question.id for p in a[2]) or real(*a))
    answers = answer_questions(*tiny_model, questions(), GREEDY, path, "model", helpers=OneOfTwo())
    alone = answer_questions(*tiny_model, questions(), GREEDY, tmp_path / "alone.jsonl", "model")
    assert answers == alone and sorted(asked) == sorted(2 * [f"q{i}" for i in range(7)])
    assert list(tmp_path.glob("answers.*.jsonl")) == [] and len(read_lines(path)) == 7


def test_a_helpers_torn_line_is_answered_here(tiny_model, tmp_path):
    path = tmp_path / "answers.jsonl"
    share_path(path, 1).write_bytes(b'{"id": "q1"}\n{"id": "q2", "te')
    answers = answer_questions(*tiny_model, questions(), GREEDY, path, "model")
    assert not share_path(path, 1).exists() and [a["id"] for a in answers] == [f"q{i}" for i in range(7)]


def test_answers_that_carry_a_seal_as_earlier_versions_wrote_them_are_kept(tiny_model, tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    first = answer_questions(*tiny_model, questions(), GREEDY, path, "model")
    path.unlink()
    append_lines(path, [{**answer, "seal": "0123456789abcdef"} for answer in first])
    monkeypatch.setattr(generation, "generate_batch", None)
    again = answer_questions(*tiny_model, questions(), GREEDY, path, "model")
    assert [a["text"] for a in again] == [a["text"] for a in first]


def draw(scores: torch.Tensor, numbers: np.ndarray, **settings) -> list[int]:
    """The tokens that a row of logits gives for each of `numbers`, one number a row."""
    config = GenerateSection(do_sample=True, **{"temperature": 1.0, "top_p": 1.0, **settings})
    rows = scores.repeat(len(numbers), 1)
    ids = torch.zeros((len(numbers), 3), dtype=torch.long)
    processors = sampling_processors(config, [np.array([n]) for n in numbers], 3, scores.device)
    return processors(ids, rows).argmax(dim=-1).tolist()


def test_a_session_that_ends_between_two_batches_goes_on_to_the_same_answers(tiny_model, tmp_path, monkeypatch):
    sampled = GREEDY.model_copy(update={"do_sample": True, "batch_size": 1})
    undisturbed = answer_questions(*tiny_model, questions(), sampled, tmp_path / "whole.jsonl", "model")
    looks = iter([False, False, True])
    monkeypatch.setattr(generation.Deadline, "is_due", lambda self, **_: next(looks, False))
    path = tmp_path / "ended.jsonl"
    with pytest.raises(SessionOver, match=r"questions wait for their answers, because this session is .* h old"):
        answer_questions(*tiny_model, questions(), sampled, path, "model", max_hours=9)
    assert 0 < len(read_lines(path)) < len(questions())
    assert answer_questions(*tiny_model, questions(), sampled, path, "model", max_hours=9) == undisturbed


@pytest.mark.parametrize(("mean", "limit"), [(300.0, 1200), (1100.0, 4096), (4000.0, 4096)])
def test_the_expected_length_of_an_answer_is_right_while_most_are_still_being_written(mean, limit):
    """10,000 answers whose lengths have one rate of ending, looked at after 256 tokens each."""
    lengths = np.random.default_rng(1).exponential(mean, 10_000)
    so_far = np.minimum(lengths, 256)
    found = expected_tokens(int(so_far.sum()), int((lengths <= 256).sum()), limit)
    assert found == pytest.approx(np.minimum(lengths, limit).mean(), rel=0.06)
    assert np.minimum(lengths, 256)[lengths <= 256].mean() < 0.6 * found  # what the ended ones alone would say


def test_while_no_answer_has_ended_each_is_expected_to_reach_the_limit():
    assert expected_tokens(5000, 0, 4096) == 4096


def test_a_long_answering_says_once_what_the_rest_will_take_and_what_comes_after(
    tiny_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("utils.progress._FORECAST_AFTER_S", 0.0)
    monkeypatch.setattr("utils.progress._WORTH_A_FORECAST_S", 0.0)
    single = GREEDY.model_copy(update={"batch_size": 1})
    answer_questions(*tiny_model, questions(), single, tmp_path / "a.jsonl", "model", ahead=" And then?")
    said = capsys.readouterr().out
    assert said.count("Forecast: about ") == said.count(" that have ended). And then?") == 1
    assert re.search(
        r"more for these answers \([\d,]+ tokens/s so far, some [\d,]+ tokens an answer by [01] that", said
    )


def test_answers_that_take_less_than_half_a_minute_are_not_forecast(tiny_model, tmp_path, capsys):
    single = GREEDY.model_copy(update={"batch_size": 1})
    answer_questions(*tiny_model, questions(), single, tmp_path / "answers.jsonl", "model")
    assert "Forecast" not in capsys.readouterr().out


def test_what_is_drawn_follows_the_distribution():
    scores = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    tokens = draw(scores, question_stream(1, "q", 20_000))
    expected = 20_000 * torch.softmax(scores[0].double(), dim=0).numpy()
    assert stats.chisquare(np.bincount(tokens, minlength=4), expected).pvalue > 0.001


def test_temperature_and_top_p_are_those_of_transformers():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    tokens = draw(scores, question_stream(2, "q", 20_000), temperature=0.5, top_p=0.9)
    kept = torch.softmax(scores[0, :2].double() / 0.5, dim=0).numpy()  # 0.865 + 0.117 reach 0.9
    assert set(tokens) == {0, 1}
    assert stats.chisquare(np.bincount(tokens), 20_000 * kept).pvalue > 0.001


def test_a_number_at_either_end_never_draws_an_impossible_token():
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert draw(scores, np.array([0.0, np.nextafter(1.0, 0.0)])) == [1, 2]


def test_a_stream_belongs_to_its_seed_and_question_and_is_the_same_however_long():
    stream = question_stream(0, "a", 50)
    assert (stream[:10] == question_stream(0, "a", 10)).all()
    for other in (question_stream(1, "a", 50), question_stream(0, "b", 50)):
        assert not (stream == other).any()


def test_streams_are_uniform_across_questions():
    firsts = [question_stream(3407, f"q{i}", 1)[0] for i in range(2000)]
    assert stats.kstest(firsts, "uniform").pvalue > 0.001


def test_greedy_decoding_needs_no_processor():
    assert len(sampling_processors(GenerateSection(do_sample=False), [], 0, torch.device("cpu"))) == 0


def test_a_sound_model_agrees(tiny_model):
    found = check_batching(*tiny_model, questions())
    assert found["prompts"] == 4 and found["identical"] + found["near_ties"] == 4 and found["near_ties"] <= 1


def test_one_question_is_enough_and_none_is_no_error(tiny_model):
    assert check_batching(*tiny_model, questions()[:1])["prompts"] == 1
    assert check_batching(*tiny_model, [])["prompts"] == 0


def test_a_batch_that_ignores_its_padding_is_stopped(tiny_model, monkeypatch):
    """What unsloth did until pull request 4100: the attention mask was dropped for batches."""
    model, real = tiny_model[0], tiny_model[0].generate
    monkeypatch.setattr(
        model, "generate", lambda attention_mask, **k: real(attention_mask=torch.ones_like(attention_mask), **k)
    )
    with pytest.raises(ModelError, match=r"otherwise than alone.*generate.batch_size=1"):
        check_batching(*tiny_model, questions())
    assert check_batching(*tiny_model, questions(), batch_size=1)["prompts"] == 0


def test_a_near_tie_is_rounding_and_not_an_error(tiny_model, monkeypatch):
    def swapped(model, tokenizer, batch, steps, config):
        outputs = generate_batch(model, tokenizer, batch, steps, config)
        return outputs if len(batch) == 1 else [[ids[0] ^ 1, *ids[1:]] for ids in outputs]

    monkeypatch.setattr(generation, "generate_batch", swapped)
    logits = torch.linspace(0, 1e-3, 400) + torch.eye(400)[7]
    monkeypatch.setattr(generation, "last_logits", lambda model, ids: logits[None])
    assert check_batching(*tiny_model, questions())["near_ties"] >= 3
