"""A batch's step must give what transformers gives: left padding, grouped heads, a cache that grows, with and without a graph."""

from __future__ import annotations

import math
from typing import ClassVar

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
    monkeypatch.setattr(decode_graph, "GROWTH", 8)  # so that it grows twice
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


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("count", [1, 17])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@torch.inference_mode()
def test_it_is_scaled_dot_product_attention(kv_heads, count, masked):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, count, 16), *torch.randn(2, 3, kv_heads, 17, 16)
    mask = torch.ones(3, 1, 1, 17, dtype=torch.bool)
    mask[1, ..., :2] = mask[2, ..., :5] = False
    options = {"attn_mask": mask if masked else None, "enable_gqa": True, "scale": 0.3 if masked else None}
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attend_by_groups(query, key, value, **options), expected)


def test_half_precision_does_not_overflow_where_the_product_before_scaling_would():
    query, key, value = (torch.randn(3, heads, 17, 128).half() * 60 for heads in (8, 2, 2))
    assert torch.isfinite(
        attend_by_groups(query[:, :, :1], key, value, torch.ones(3, 1, 1, 17, dtype=torch.bool))
    ).all()


class Graph:
    """A CUDA graph's stand-in on the CPU: what is captured has run once, each further replay runs it again."""

    made: ClassVar[list] = []

    def __init__(self):
        Graph.made.append(self)
        self.replays = 0

    def replay(self):
        self.replays += 1
        if self.replays > 1:
            self.decoder.states = self.decoder._run()


class Capture:
    """torch.cuda.graph's stand-in; `broken` as where a capture cannot be ended."""

    broken = False

    def __init__(self, graph): ...

    def __enter__(self): ...

    def __exit__(self, *error):
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins for what a capture needs; gives the streams that were made current."""
    streams: list = []
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(Decoder, "steps_before_graph", 1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    return streams


def states_of(model, before_capture: float, steps: int = 20):
    """The states of so many steps of the three prompts, one after the other."""
    ids, mask = prompts("cpu")
    decoder, places, found = decoder_of(model, ids, mask), mask.sum(1, keepdim=True), []
    decoder.before_capture = before_capture
    Graph.decoder = decoder
    for step in range(steps):
        found.append(decoder.step(ids[:, step % 9].unsqueeze(1), places + step).clone())
    return torch.cat(found, 1), decoder


@torch.inference_mode()
def test_a_graph_is_captured_after_the_first_step_and_anew_for_each_growth(monkeypatch, graphs):
    monkeypatch.setattr(decode_graph, "GROWTH", 8)
    model = llama()
    expected, _ = states_of(model, math.inf)
    assert Graph.made == []
    found, _ = states_of(model, 1)
    torch.testing.assert_close(found, expected)
    # Of 9 tokens at first, with room for 16; full after 7 steps, and after 8 more.
    assert [graph.replays for graph in Graph.made] == [6, 8, 5] and graphs == []


@torch.inference_mode()
def test_where_no_graph_can_be_made_it_says_so_once_and_goes_on(monkeypatch, graphs, capsys):
    """As on a GPU whose driver refuses: the answers are the same, slower, and what was current stays so."""
    monkeypatch.setattr(Capture, "broken", True)
    model = llama()
    expected, _ = states_of(model, math.inf, 3)
    found, decoder = states_of(model, 1, 3)
    torch.testing.assert_close(found, expected)
    assert capsys.readouterr().out.count("launch by launch") == len(Graph.made) == 1 and decoder.graph is None
    assert graphs == ["the stream"] and decoder_of(model, *prompts("cpu")).steps_before_graph == math.inf
