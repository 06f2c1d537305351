"""One new token for each sequence of a batch, as one CUDA graph.

Such a step of an 8B model is some 2,000 launches: Python takes 40 ms to make them, an H200 15 ms to run them. A graph makes
all of them at once, see https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/.
"""

import math

import torch
from torch.nn.functional import pad

GROWTH = 128  # tokens by which the cache grows; for each growth the graph is captured anew


class Decoder:
    """Keys and values of a batch, and the graph of a step over them. For Llama: without sliding windows.

    `model` is transformers' LlamaModel. `past` holds each layer's keys and values of the prompts (rows, kv_heads, length,
    head size) and is freed; `mask` (rows, length) is 1 where to look. `linear(layer, x)` gives a linear layer's product,
    `tables(length)` rotary cosines and sines (at least length, head size).
    """

    steps_before_graph = 1  # launch by launch, on CUDA: the first sets libraries up

    def __init__(self, model, past, mask, linear, tables):
        self.model, self.linear, self.tables = model, linear, tables
        self.cache, self.mask, self.length = list(past), mask[:, None, None].bool(), mask.shape[1]
        self.ids, self.positions = (torch.zeros_like(mask[:, :1], dtype=torch.long) for _ in range(2))
        self.place = torch.zeros_like(self.ids[0])
        self.graph, self.before_capture = None, self.steps_before_graph if mask.is_cuda else math.inf
        self._grow()

    def past(self) -> list[tuple]:
        """Views of each layer's keys and values so far: `generate` reads the length from them, and beam search reorders them."""
        return [tuple(x[:, :, : self.length] for x in pair) for pair in self.cache]

    def step(self, ids, positions):
        """The hidden states (rows, 1, hidden size) that `ids` (rows, 1) at `positions` (rows, 1) lead to."""
        if self.length == self.mask.shape[-1]:
            self._grow()
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.place.fill_(self.length)
        self.length += 1
        if self.graph is None and self.before_capture == 0:
            self._capture()
        if self.graph is None:
            self.before_capture -= 1
            return self._run()
        self.graph.replay()
        return self.states

    def _grow(self) -> None:
        """Make room for more tokens, layer by layer: only one of them is there twice."""
        self.graph = self.states = None
        more = GROWTH - self.length % GROWTH
        for number, pair in enumerate(self.cache):
            self.cache[number] = tuple(pad(x, (0, 0, 0, more)) for x in pair)
            for x in pair:
                x.untyped_storage().resize_(0)  # generate, too, refers to the prompts'
        self.mask = pad(self.mask, (0, more))
        self.cos, self.sin = self.tables(self.mask.shape[-1])

    def _capture(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self.states = self._run()
            self.graph = graph
        except RuntimeError as error:  # the step itself tells whether memory is short
            torch.cuda.set_stream(stream)  # a capture that could not end leaves its own
            print(f"from here on answering launch by launch, which is slower, as no CUDA graph could be made: {error}")
            self.before_capture = Decoder.steps_before_graph = math.inf

    def _run(self):
        hidden = self.model.embed_tokens(self.ids).to(self.cache[0][0].dtype)
        self.mask.index_fill_(-1, self.place, True)
        rotation = [table[self.positions].unsqueeze(1).to(hidden.dtype) for table in (self.cos, self.sin)]
        for layer, (keys, values) in zip(self.model.layers, self.cache, strict=True):
            hidden = hidden + self._attend(layer.self_attn, layer.input_layernorm(hidden), keys, values, *rotation)
            normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
            gated = mlp.act_fn(self.linear(mlp.gate_proj, normed)) * self.linear(mlp.up_proj, normed)
            hidden = hidden + self.linear(mlp.down_proj, gated)
        return self.model.norm(hidden)

    def _attend(self, attention, hidden, keys, values, cos, sin):
        def rotate(x):
            first, second = x.chunk(2, dim=-1)
            return torch.addcmul(x * cos, torch.cat((-second, first), dim=-1), sin)

        products = (self.linear(layer, hidden) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        query, key, value = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in products)
        keys.index_copy_(2, self.place, rotate(key))
        values.index_copy_(2, self.place, value)
        attended = attend_by_groups(rotate(query), keys, values, self.mask)
        return self.linear(attention.o_proj, attended.transpose(1, 2).flatten(2))


def attend_by_groups(query, key, value, attn_mask=None, is_causal=False, enable_gqa=True, scale=None):
    """What `scaled_dot_product_attention` gives for one new token of each sequence, without repeating keys for each head.

    query is (batch, heads, 1, size), key and value (batch, kv_heads, length, size), attn_mask (batch, 1, 1, length) True
    where to look. Several new tokens go to torch.
    """
    if query.shape[2] > 1:
        options = {"attn_mask": attn_mask, "is_causal": is_causal, "enable_gqa": enable_gqa, "scale": scale}
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    grouped = query.reshape(*key.shape[:2], -1, query.shape[-1]) * (scale or query.shape[-1] ** -0.5)
    scores = torch.matmul(grouped, key.transpose(-1, -2))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask[:, :1], -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).reshape(query.shape)
