"""Training in CUDA graphs, for the case "ours, in graphs": one for a micro-batch's pass through the layers, one for the way back.

Such a pass of an 8B model is some 6,000 launches: where Python takes longer to make them than the GPU to run them, the GPU
waits. A graph makes all of them at once, see https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/. The series does
not train so: docs/performance.md says why. `use_graphs` replaces what it has to in the series and in unsloth.
"""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import NamedTuple

import torch
from torch.nn.functional import pad

# Tokens and documents are rounded up to multiples of these: each pair of numbers has graphs of its own.
_TOKENS, _DOCUMENTS = 64, 8


class Documents(NamedTuple):
    """Where the documents of a micro-batch begin and the last one ends, and how many tokens one may have."""

    lengths: torch.Tensor  # (documents,), unused: unsloth asks for a tensor, and a graph holds for any lengths
    boundaries: torch.Tensor  # (documents + 1,), int32
    longest: int


class TrainingGraphs:
    """The graphs of a model, whose layers `run_layers(ids, positions, documents)` runs: hidden states (1, tokens, size).

    Trained are `weights`; a document has at most `longest` tokens. All graphs share what they give, and a pool of memory, as
    only one micro-batch is on its way at a time.
    """

    def __init__(self, run_layers, weights, longest: int):
        self.run_layers, self.weights, self.longest, self.passes = run_layers, weights, longest, {}
        self.gradients = [torch.empty_like(weight) for weight in weights]
        self.states = self.to_states = torch.empty(0)  # hidden states (tokens, size) and their gradient
        self.pool = torch.cuda.graph_pool_handle() if weights[0].is_cuda else None

    def run(self, ids, positions, lengths):
        """Hidden states of `ids` (1, tokens), which are documents of `lengths` tokens and then padding."""
        tokens, documents = ids.shape[1], _round_up(len(lengths) + 1, _DOCUMENTS)
        # The longest first: what it frees holds all others.
        for length in (_round_up(_round_up(tokens, self.longest), _TOKENS), _round_up(tokens, _TOKENS)):
            if length > len(self.states):
                self._make_room(length, documents)
            if (length, documents) not in self.passes:
                self.passes[length, documents] = new = _Pass(self, length, documents)
                new.capture()
        current = self.passes[length, documents]
        current.fill(ids, positions, lengths)
        return _Replay.apply(current, tokens, *self.weights)

    def _make_room(self, length: int, documents: int) -> None:
        """Make states and their gradient for `length` tokens, after a pass of that length without a graph.

        That pass sets libraries up, compiles kernels, and fails where memory is short: within a capture that would end the
        process.
        """
        self.passes.clear()
        with torch.enable_grad():
            states = _Pass(self, length, documents).run_layers()
        torch.autograd.grad(states, self.weights, torch.zeros_like(states))
        self.states, self.to_states = (torch.zeros_like(states.detach()[0]) for _ in range(2))


def _round_up(count: int, step: int) -> int:
    return count + -count % step


class _Pass:
    """The inputs of one length, and its graphs: `there` fills states, `back` makes gradients of theirs."""

    def __init__(self, graphs: TrainingGraphs, tokens: int, documents: int):
        self.graphs, self.tokens, device = graphs, tokens, graphs.weights[0].device
        self.ids, self.positions = (torch.zeros((1, tokens), dtype=torch.long, device=device) for _ in range(2))
        lengths = torch.zeros(documents, dtype=torch.int32, device=device)
        self.boundaries = pad(lengths + tokens, (1, 0))
        self.documents = Documents(lengths, self.boundaries, min(tokens, graphs.longest))

    def fill(self, ids, positions, lengths) -> None:
        more = self.tokens - ids.shape[1]
        self.ids.copy_(pad(ids, (0, more)))
        self.positions.copy_(pad(positions, (0, more)))
        ends = lengths.to(self.boundaries.device, non_blocking=True).cumsum(0)
        self.boundaries[1:].copy_(pad(ends, (0, len(self.boundaries) - 1 - len(ends)), value=self.tokens))

    def capture(self) -> None:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # what was cast before would not be cast again
        try:
            self.there = capture(self._there, self.graphs.pool)
            self.back = capture(self._back, self.graphs.pool)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def run_layers(self):
        return self.graphs.run_layers(self.ids, self.positions, self.documents)

    def _there(self) -> None:
        with torch.enable_grad():
            self.root = self.run_layers()
        self.graphs.states[: self.tokens].copy_(self.root.detach()[0])

    def _back(self) -> None:
        given = self.graphs.to_states[None, : self.tokens]
        torch._foreach_copy_(self.graphs.gradients, torch.autograd.grad(self.root, self.graphs.weights, given))
        del self.root  # the pool's memory is for the other lengths now


def capture(launch, pool):
    """What repeats all that `launch()` asks of the GPU."""
    graph = torch.cuda.CUDAGraph()
    # NCCL's threads may ask the driver meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        launch()
    return graph.replay


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current: _Pass, tokens: int, *weights):
        ctx.current = current
        current.there()
        return current.graphs.states[None, :tokens]

    @staticmethod
    def backward(ctx, gradient):
        current, tokens = ctx.current, gradient.shape[1]
        current.graphs.to_states[:tokens].copy_(gradient[0])
        current.graphs.to_states[tokens : current.tokens].zero_()
        current.back()
        return None, None, *current.graphs.gradients  # kept there too, so that autograd copies them


@cache
def use_graphs() -> None:
    """Let this process train in graphs, before a model is loaded."""
    from utils.models import load
    from utils.training import callbacks, step_plan

    as_before = load.patch_unsloth

    @cache
    def patch_unsloth() -> None:
        from unsloth.models import llama

        as_before()
        llama.run_attention = attend_in_graphs(llama.run_attention)
        llama.LlamaModel_fast_forward = train_in_graphs(llama.LlamaModel_fast_forward)

    load.patch_unsloth = patch_unsloth
    callbacks.RecomputeCallback = step_plan.RecomputeCallback = recompute_in_graphs(callbacks.RecomputeCallback)


def recompute_in_graphs(callback: type) -> type:
    """RecomputeCallback, with layers that recompute without looking up random numbers, which a graph cannot."""
    from torch.utils.checkpoint import checkpoint

    from utils.models.load import transformer_layers

    class Recompute(callback):
        def on_step_begin(self, args, state, control, model=None, **more):
            super().on_step_begin(args, state, control, model=model, **more)
            for layer in transformer_layers(model):
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    return Recompute


def attend_in_graphs(ours: Callable) -> Callable:
    """Wrap `run_attention`: documents of a graph go to the series' kernel, all else to what the series has chosen."""
    from utils.models import unsloth_patches

    def attend(*, config, context, Q, K, V):
        if not isinstance(context.seq_info, Documents):
            return ours(config=config, context=context, Q=Q, K=K, V=V)
        queries, keys, values = (x.transpose(1, 2) for x in (Q, K, V))
        _, boundaries, longest = context.seq_info
        return unsloth_patches.attend_within_documents(queries, keys, values, boundaries, longest)

    return attend


def train_in_graphs(unsloths: Callable) -> Callable:
    """Wrap unsloth's pass over the layers: packed rows in training go through `TrainingGraphs`, all else stays with it."""

    @wraps(unsloths)
    def forward(self, **given):
        ids, lengths = given["input_ids"], given.get("packed_seq_lengths")
        if lengths is None or len(ids) > 1 or not (self.training and torch.is_grad_enabled()):
            return unsloths(self, **given)
        from transformers.modeling_outputs import BaseModelOutputWithPast
        from unsloth.utils import packing

        from utils.models.memory import free_memory

        def run_layers(ids, positions, documents):
            # By itself unsloth would ask the GPU for the longest of them, which a graph cannot wait for.
            packing._PACKED_INFO_CACHE[ids.device] = {"seq_lengths": documents.lengths, "result": documents}
            told = {"input_ids": ids, "position_ids": positions, "packed_seq_lengths": documents.lengths}
            return unsloths(self, **told, use_cache=False, return_dict=True).last_hidden_state

        recomputing = [layer.gradient_checkpointing for layer in self.layers]
        if getattr(self, "training_graphs", None) is None or self.recomputing != recomputing:
            self.training_graphs = None
            free_memory()
            weights = [weight for weight in self.parameters() if weight.requires_grad]
            self.training_graphs, self.recomputing = (
                TrainingGraphs(run_layers, weights, self.max_seq_length),
                recomputing,
            )
        stream = torch.cuda.current_stream()
        try:
            states = self.training_graphs.run(ids, given["position_ids"], lengths)
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a capture that could not end leaves its own
            self.training_graphs = None
            raise
        return BaseModelOutputWithPast(last_hidden_state=states)

    return forward
