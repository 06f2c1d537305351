"""Packed rows in graphs must train as they do without: states, gradients, documents apart, one length after another."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaModel

from benchmarks import training_graphs
from benchmarks.peers import CASES
from benchmarks.training_graphs import (
    Documents,
    TrainingGraphs,
    attend_in_graphs,
    recompute_in_graphs,
    train_in_graphs,
    use_graphs,
)
from utils.models import load
from utils.training import callbacks, step_plan
from utils.training.callbacks import RecomputeCallback

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]
BATCHES = [
    [5, 20, 9],
    [30, 3],
    [64],
    [40, 60, 2, 2, 2, 2, 2, 3],
    [7],
]  # lengths of documents: graphs of 128, 64 and 64 tokens


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """On a CPU a graph is what it would be captured from; notes the length of each capture, there and back."""
    noted, real = [], training_graphs.capture

    def capture(launch, pool):
        noted.append(launch.__self__.tokens)
        if pool is not None:
            return real(launch, pool)
        launch()
        return launch

    monkeypatch.setattr(training_graphs, "capture", capture)
    return noted


class Layers(torch.nn.Module):
    """A small Llama's layers, of which the projections of queries are trained, in graphs or not."""

    def __init__(self, longest: int = 128):
        super().__init__()
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
        self.llama = LlamaModel(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).requires_grad_(
            False
        )
        for layer in self.llama.layers:
            layer.self_attn.q_proj.requires_grad_(True)
        self.longest, self.graphs = longest, None

    def weights(self) -> list:
        return [weight for weight in self.parameters() if weight.requires_grad]

    def run_layers(self, ids, positions, documents):
        places = torch.arange(ids.shape[1], device=ids.device)
        mine = torch.searchsorted(documents.boundaries, places.int(), right=True)
        seen = (mine[:, None] == mine) & (places[:, None] >= places)
        mask = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)
        return self.llama(
            ids, attention_mask=mask[None, None], position_ids=positions, use_cache=False
        ).last_hidden_state

    def forward(self, ids, positions, lengths):
        self.graphs = self.graphs or TrainingGraphs(self.run_layers, self.weights(), self.longest)
        return self.graphs.run(ids, positions, lengths)


def micro_batch(lengths: list[int], padding: int, device: str):
    """Ids and positions (1, tokens) of documents and padding behind them."""
    ids = torch.randint(1, 60, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    padded = (torch.nn.functional.pad(x, (0, padding)).to(device) for x in (ids, positions))
    return *padded, torch.tensor(lengths, dtype=torch.int32)


def loss_of(states):
    return (states.float() * torch.linspace(-1, 1, states.shape[1], device=states.device)[None, :, None]).sum()


def each_alone(layers: Layers, ids, lengths) -> torch.Tensor:
    parts = ids[:, : sum(lengths)].split(lengths, dim=1)
    return torch.cat([layers.llama(part, use_cache=False).last_hidden_state for part in parts], dim=1)


@pytest.mark.parametrize("device", DEVICES)
def test_documents_have_the_states_that_each_has_alone_and_micro_batches_add_their_gradients(device):
    layers, plain = Layers().to(device), Layers().to(device)
    for lengths in BATCHES:
        ids, positions, told = micro_batch(lengths, 3, device)
        states, expected = layers(ids, positions, told), each_alone(plain, ids, lengths)
        assert states.shape[:2] == ids.shape
        torch.testing.assert_close(states[:, : sum(lengths)], expected, rtol=1e-4, atol=1e-5)
        loss_of(states[:, : sum(lengths)]).backward()
        loss_of(expected).backward()
    for ours, theirs in zip(layers.weights(), plain.weights(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
        assert all(ours.grad.data_ptr() != buffer.data_ptr() for buffer in layers.graphs.gradients)


def test_the_longest_is_captured_first_and_each_length_once(launches):
    layers = Layers()
    for lengths in BATCHES * 2:
        ids, positions, told = micro_batch(lengths, 0, "cpu")
        loss_of(layers(ids, positions, told)).backward()
    assert launches == [128, 128, 64, 64, 128, 128]  # more than seven documents need one of their own
    assert set(layers.graphs.passes) == {(128, 8), (64, 8), (128, 16)}


def test_a_larger_micro_batch_makes_room_and_captures_anew(launches):
    layers = Layers(longest=64)
    for lengths in ([40], [60, 60], [40]):
        ids, positions, told = micro_batch(lengths, 0, "cpu")
        loss_of(layers(ids, positions, told)).backward()
    assert launches == [64, 64, 128, 128, 64, 64] and len(layers.graphs.states) == 128


def test_distributed_data_parallel_takes_the_gradients_of_all_micro_batches(monkeypatch):
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        layers, plain = Layers(), Layers()
        wrapped = DistributedDataParallel(layers)
        batches = [micro_batch(lengths, 3, "cpu") for lengths in BATCHES[:2]]
        with wrapped.no_sync():
            loss_of(wrapped(*batches[0])).backward()
        loss_of(wrapped(*batches[1])).backward()
        for batch in batches:
            loss_of(plain(*batch)).backward()
        for ours, theirs in zip(layers.weights(), plain.weights(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    finally:
        distributed.destroy_process_group()


def test_documents_of_a_graph_go_to_the_series_kernel_and_all_else_stays(monkeypatch):
    monkeypatch.setattr("utils.models.unsloth_patches.attend_within_documents", lambda *given: given)
    attend, query = attend_in_graphs(lambda **_: "the series'"), torch.zeros(1, 4, 10, 8)
    given = {"config": None, "Q": query, "K": query[:, :2], "V": query[:, :2]}
    *found, boundaries, longest = attend(context=SimpleNamespace(seq_info=Documents(1, "boundaries", 3)), **given)
    assert [x.shape for x in found] == [(1, 10, 4, 8), (1, 10, 2, 8), (1, 10, 2, 8)]
    assert (boundaries, longest) == ("boundaries", 3)
    for others in (None, (1, 2, 3)):
        assert attend(context=SimpleNamespace(seq_info=others), **given) == "the series'"


class Backbone(torch.nn.Module):
    """What unsloth's pass over the layers is called with: as many layers as `recomputing`, and a weight to train."""

    def __init__(self, *recomputing: bool):
        super().__init__()
        self.weight, self.max_seq_length = torch.nn.Parameter(torch.ones(1)), 64
        self.layers = [SimpleNamespace(gradient_checkpointing=flag) for flag in recomputing]


@pytest.fixture
def passes(monkeypatch):
    """What `forward` called: graphs answer "a graph's", or raise what `passes.error` holds."""
    called = SimpleNamespace(error=None, unsloths=[], graphs=[], streams=[], known={})

    def unsloths(self, **given):
        called.unsloths.append(given)
        return SimpleNamespace(last_hidden_state="unsloth's")

    def run(self, ids, positions, lengths):
        called.graphs.append(self)
        if called.error:
            raise called.error
        return "a graph's"

    modules = {"unsloth.utils": SimpleNamespace(packing=SimpleNamespace(_PACKED_INFO_CACHE=called.known))}
    for name, module in {"unsloth": SimpleNamespace(), **modules}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(TrainingGraphs, "run", run)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    monkeypatch.setattr(torch.cuda, "set_stream", called.streams.append)
    called.forward = train_in_graphs(unsloths)
    return called


def packed(**changed) -> dict:
    ids = torch.ones((1, 6), dtype=torch.long)
    return {"input_ids": ids, "position_ids": ids, "packed_seq_lengths": torch.tensor([4, 2]), **changed}


def test_packed_rows_in_training_go_through_graphs_which_stay_until_other_layers_recompute(passes):
    backbone = Backbone(True, False)
    for _ in range(2):
        assert passes.forward(backbone, **packed()).last_hidden_state == "a graph's"
    first, second = passes.graphs
    assert first is second and first.weights == [backbone.weight] and first.longest == 64 and not passes.unsloths
    backbone.layers[1].gradient_checkpointing = True
    passes.forward(backbone, **packed())
    assert passes.graphs[2] is not first


@pytest.mark.parametrize("case", ["evaluating", "no gradients", "not packed", "several rows"])
def test_what_graphs_are_not_for_stays_with_unsloth(passes, case):
    backbone, given = Backbone(True), packed()
    if case == "evaluating":
        backbone.eval()
    elif case == "not packed":
        given["packed_seq_lengths"] = None
    elif case == "several rows":
        given["input_ids"] = torch.ones((2, 6), dtype=torch.long)
    with torch.set_grad_enabled(case != "no gradients"):
        assert passes.forward(backbone, **given).last_hidden_state == "unsloth's"
    assert not passes.graphs


def test_running_out_of_memory_leaves_no_graphs_and_the_stream_as_it_was(passes):
    backbone, passes.error = Backbone(True), RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        passes.forward(backbone, **packed())
    assert backbone.training_graphs is None and passes.streams == ["the stream"]


def test_unsloth_is_told_of_documents_without_asking_the_gpu(passes):
    backbone, documents = Backbone(True), Documents(torch.zeros(8), torch.tensor([0, 4, 64]), 64)
    passes.forward(backbone, **packed())
    ids = torch.ones((1, 64), dtype=torch.long)
    assert passes.graphs[0].run_layers(ids, ids, documents) == "unsloth's"
    (told,) = passes.unsloths
    assert told["input_ids"] is told["position_ids"] is ids and not told["use_cache"]
    assert passes.known[ids.device]["seq_lengths"] is told["packed_seq_lengths"] is documents.lengths
    assert passes.known[ids.device]["result"] is documents


def test_layers_recompute_without_looking_up_random_numbers(monkeypatch):
    layers = [SimpleNamespace(gradient_checkpointing=True) for _ in range(3)]
    monkeypatch.setattr("utils.models.load.transformer_layers", lambda model: layers)
    monkeypatch.setattr("utils.training.callbacks.transformer_layers", lambda model: layers)
    recompute_in_graphs(RecomputeCallback)(1).on_step_begin(None, None, None, model=None)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, False]
    assert all(layer._gradient_checkpointing_func.keywords["preserve_rng_state"] is False for layer in layers)


def test_the_case_in_graphs_changes_what_the_series_and_unsloth_call(monkeypatch):
    llama = SimpleNamespace(run_attention=min, LlamaModel_fast_forward=max)
    for name, module in {"unsloth": SimpleNamespace(), "unsloth.models": SimpleNamespace(llama=llama)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    patched = []
    monkeypatch.setattr(load, "patch_unsloth", lambda: patched.append("as before"))
    for module, name in ((callbacks, "RecomputeCallback"), (step_plan, "RecomputeCallback")):
        monkeypatch.setattr(module, name, getattr(module, name))
    use_graphs.__wrapped__()
    for _ in range(2):  # as each model that is loaded asks for it
        load.patch_unsloth()
    assert patched == ["as before"] and llama.run_attention is not min
    assert llama.LlamaModel_fast_forward.__wrapped__ is max  # wrapped once
    assert CASES["ours, in graphs"]["one"] and step_plan.RecomputeCallback is callbacks.RecomputeCallback
    assert (
        issubclass(step_plan.RecomputeCallback, RecomputeCallback)
        and step_plan.RecomputeCallback is not RecomputeCallback
    )
