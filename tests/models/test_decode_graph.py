"""A batch's step must give what transformers gives: left padding, grouped heads, a cache that grows, with and without a graph."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from utils.models import decode_graph
from utils.models.decode_graph import Decoder, attend_by_groups

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


def llama(heads: int = 4, kv_heads: int = 2):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 60}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=kv_heads)).eval()


def prompts(device: str):
    """Ids (3, 9), padded on the left by 0, 4 and 8, and their mask."""
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :8] = 0
    return ids.to(device), mask.to(device)


def decoder_of(model, ids, mask) -> Decoder:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = model(ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    past = [(layer.keys, layer.values) for layer in cache.layers]

    def tables(length):
        places = torch.arange(length, device=ids.device)[None]
        return [table[0] for table in model.model.rotary_emb(past[0][0], places)]

    return Decoder(model.model, past, mask, lambda layer, x: layer(x), tables)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (4, 1)])
@torch.inference_mode()
def test_steps_give_what_the_whole_sequences_give(monkeypatch, heads, kv_heads, device):
    monkeypatch.setattr(decode_graph, "_GROWTH", 8)  # so that it grows twice
    model = llama(heads, kv_heads).to(device)
    ids, mask = prompts(device)
    decoder = decoder_of(model, ids, mask)
    for step in range(20):
        new = (ids[:, -1:] * 7 + step) % 60
        ids, mask = torch.cat((ids, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        states = decoder.step(new, positions[:, -1:])
        torch.testing.assert_close(states, expected[:, -1:], atol=2e-5, rtol=2e-5)
        assert decoder.past()[0][0].shape[2] == ids.shape[1]
        assert (decoder.graph is not None) is (device == "cuda" and step > 0)


@torch.inference_mode()
def test_keys_and_values_are_freed_as_soon_as_they_are_copied():
    model, (ids, mask) = llama(), prompts("cpu")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    past = [(layer.keys, layer.values) for layer in cache.layers]
    decoder = Decoder(model.model, past, mask, None, lambda length: (None, None))
    first = [x for pair in decoder.cache for x in pair]
    decoder._grow()
    assert [x.untyped_storage().size() for x in (*sum(past, ()), *first)] == [0] * 12
    assert all(x.untyped_storage().size() > 0 for pair in decoder.cache for x in pair)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@torch.inference_mode()
def test_it_is_scaled_dot_product_attention(kv_heads):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 1, 16), torch.randn(3, kv_heads, 17, 16), torch.randn(3, kv_heads, 17, 16)
    mask = torch.ones(3, 1, 1, 17, dtype=torch.bool)
    mask[1, ..., :2] = mask[2, ..., :5] = False
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend_by_groups(query, key, value, mask), expected)


def test_half_precision_does_not_overflow_where_the_product_before_scaling_would():
    query, key, value = (torch.randn(3, heads, 17, 128).half() * 60 for heads in (8, 2, 2))
    assert torch.isfinite(
        attend_by_groups(query[:, :, :1], key, value, torch.ones(3, 1, 1, 17, dtype=torch.bool))
    ).all()


@torch.inference_mode()
def test_where_no_graph_can_be_made_it_says_so_and_goes_on(monkeypatch, capsys):
    """As on a GPU whose driver refuses: the answer is the same, slower."""

    class Refused:
        def __init__(self, graph): ...

        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *error): ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Refused)
    model, (ids, mask) = llama(), prompts("cpu")
    steps = {}
    for before_capture in (99, 0):
        decoder = decoder_of(model, ids, mask)
        decoder.before_capture = before_capture
        places = mask.sum(1, keepdim=True)
        steps[before_capture] = torch.cat([decoder.step(ids[:, i : i + 1], places + i) for i in range(3)])
    torch.testing.assert_close(steps[0], steps[99])
    assert capsys.readouterr().out.count("launch by launch") == 1 and decoder.graph is None
