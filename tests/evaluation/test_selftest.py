"""The self-test passes on a sound model and stops on one whose batches ignore padding."""

from __future__ import annotations

import pytest
import torch

from tests.evaluation.test_generate import questions
from utils.errors import ModelError
from utils.evaluation import selftest
from utils.evaluation.generate import generate_batch
from utils.evaluation.selftest import check_batch_agrees


def test_a_sound_model_agrees(tiny_model):
    found = check_batch_agrees(*tiny_model, questions())
    assert found["prompts"] == 4 and found["identical"] + found["near_ties"] == 4 and found["near_ties"] <= 1


def test_one_question_is_enough_and_none_is_no_error(tiny_model):
    assert check_batch_agrees(*tiny_model, questions()[:1])["prompts"] == 1
    assert check_batch_agrees(*tiny_model, [])["prompts"] == 0


def test_a_batch_that_ignores_its_padding_is_stopped(tiny_model, monkeypatch):
    """What unsloth did until pull request 4100: the attention mask was dropped for batches."""
    model, real = tiny_model[0], tiny_model[0].generate
    monkeypatch.setattr(
        model, "generate", lambda attention_mask, **k: real(attention_mask=torch.ones_like(attention_mask), **k)
    )
    with pytest.raises(ModelError, match=r"otherwise than alone.*generate.batch_size=1"):
        check_batch_agrees(*tiny_model, questions())


def test_a_lost_end_token_is_stopped(tiny_model, monkeypatch):
    def cut(model, tokenizer, batch, steps, config):
        outputs = generate_batch(model, tokenizer, batch, steps, config)
        return outputs if len(batch) == 1 else [ids[:5] for ids in outputs]

    monkeypatch.setattr(selftest, "generate_batch", cut)
    with pytest.raises(ModelError, match="ends elsewhere"):
        check_batch_agrees(*tiny_model, questions())


def test_a_near_tie_is_rounding_and_not_an_error(tiny_model, monkeypatch):
    def swapped(model, tokenizer, batch, steps, config):
        outputs = generate_batch(model, tokenizer, batch, steps, config)
        return outputs if len(batch) == 1 else [[ids[0] ^ 1, *ids[1:]] for ids in outputs]

    monkeypatch.setattr(selftest, "generate_batch", swapped)
    monkeypatch.setattr(selftest, "_next_logits", lambda model, ids: torch.linspace(0, 1e-3, 400) + torch.eye(400)[7])
    assert check_batch_agrees(*tiny_model, questions())["near_ties"] >= 3
