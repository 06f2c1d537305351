"""Sampling by each question's own stream: it follows the distribution, and nothing else in the batch."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from utils.evaluation.sampling import question_stream, sampling_processors
from utils.schema import GenerateSection


def draw(scores: torch.Tensor, numbers: np.ndarray, **settings) -> list[int]:
    """The tokens that a row of logits gives for each of `numbers`, one number a row."""
    config = GenerateSection(do_sample=True, **{"temperature": 1.0, "top_p": 1.0, **settings})
    rows = scores.repeat(len(numbers), 1)
    ids = torch.zeros((len(numbers), 3), dtype=torch.long)
    processors = sampling_processors(config, [np.array([n]) for n in numbers], 3, scores.device)
    return processors(ids, rows).argmax(dim=-1).tolist()


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
