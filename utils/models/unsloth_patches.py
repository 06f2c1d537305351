"""What we change in unsloth; to be retired as unsloth does so by itself.

Training, for GPUs without flash attention such as a T4: one launch of the memory-efficient kernel takes all documents of a
packed row, where unsloth launches one for each. Answers in batches: a step of Llama is one CUDA graph, and 4-bit products are
fused where bitsandbytes expects it to pay. On import: the one trainer of TRL that is used is rewritten.
"""

import importlib.util
from functools import cache
from importlib.metadata import version

from utils.errors import HardwareError

MADE_FOR = "2026.10.7"  # of unsloth, whose internals these patches replace
_CAUSAL = 1  # aten::_efficient_attention_forward: custom_mask_type, from each document's first token on


def import_unsloth() -> None:
    """Import unsloth. It rewrites every trainer of TRL that its models/rl.py finds: here SFTTrainer alone, 7 s sooner."""
    import trl.trainer

    find, names = importlib.util.find_spec, trl.trainer.__all__
    # It looks by dir(), which tells of what is not loaded yet by __all__, and for the experimental ones by find_spec.
    importlib.util.find_spec = lambda name, package=None: None if name == "trl.experimental" else find(name, package)
    trl.trainer.__all__ = ["sft_trainer", "SFTConfig", "SFTTrainer"]
    try:
        import unsloth  # noqa: F401
    finally:
        importlib.util.find_spec, trl.trainer.__all__ = find, names


def patch_unsloth() -> None:
    """Let unsloth use the functions below, before a model is loaded; raises HardwareError for another unsloth."""
    if (found := version("unsloth")) != MADE_FOR:
        instead = f"install {MADE_FOR}, for which it is patched here, or set hardware.backend=transformers"
        raise HardwareError(f"unsloth {found} is installed; {instead}.")
    from bitsandbytes.backends.cuda import ops
    from unsloth.kernels import utils as kernels
    from unsloth.models import llama

    from utils.models.decode_graph import GROWTH, attend_by_groups

    if getattr(llama.run_attention, "keeps_documents_apart", False):
        return
    llama.run_attention = choose_attention(llama.run_attention)
    if pays := getattr(ops, "_gemm_4bit_use_custom_fn", None):  # bitsandbytes 0.50's
        kernels._gemv_rows = multiply_4bit(kernels._gemv_rows, pays)
        kernels._GEMV_MAX_ROWS = ops._gemm_4bit_custom_max_m
    llama.scaled_dot_product_attention = attend_by_groups  # for what is not Llama and decodes by Llama's attention
    llama.KV_CACHE_INCREMENT = GROWTH  # its 512 takes 48 MiB more of an 8B model for each sequence
    llama.LlamaModel_fast_forward_inference = decode_in_graphs(llama.LlamaModel_fast_forward_inference)


def choose_attention(unsloths):
    """Wrap unsloth's `run_attention`: packed causal half-precision rows without a mask go to our kernel, all else to it."""

    def attend(*, config, context, Q, K, V):
        import torch

        half = Q.dtype in (torch.float16, torch.bfloat16) and Q.dtype == K.dtype == V.dtype
        packed = context.seq_info is not None and context.attention_mask is None and Q.shape[0] == 1
        whole = context.is_causal and not context.sliding_window and Q.shape[-2] == K.shape[-2]
        plain = context.prefix_seg_info is None and config.backend == "sdpa"
        if not (half and packed and whole and plain and Q.is_cuda and not flash_attention(Q.device.index)):
            return unsloths(config=config, context=context, Q=Q, K=K, V=V)
        from unsloth.utils.packing import cover_padded_cu_seqlens

        boundaries, longest = cover_padded_cu_seqlens(context.seq_info, K.shape[-2])
        queries, keys, values = (x.transpose(1, 2) for x in (Q, K, V))
        return attend_within_documents(queries, keys, values, boundaries, longest)

    attend.keeps_documents_apart = True
    return attend


@cache
def flash_attention(index: int) -> bool:
    """Whether GPU `index` has flash attention (compute capability 8.0 on) and it is switched on."""
    import torch

    return torch.cuda.get_device_capability(index)[0] >= 8 and torch.backends.cuda.flash_sdp_enabled()


def attend_within_documents(query, key, value, boundaries, longest: int):
    """Causal attention within each document of one packed row, on CUDA in half precision; returns query's shape.

    query is (1, tokens, heads, size), key and value (1, tokens, kv_heads, size); `boundaries` (int32, documents + 1) holds
    where each document begins and the last one ends, `longest` the tokens of the longest.
    """
    return _document_attention().apply(query, key, value, boundaries.int(), longest)


@cache
def _document_attention():
    import torch

    aten = torch.ops.aten

    class DocumentAttention(torch.autograd.Function):
        """Saves keys and values once for each group of heads, and repeats them again on the way back."""

        @staticmethod
        def forward(ctx, query, key, value, boundaries, longest):
            groups = query.shape[2] // key.shape[2]
            keys, values = (x.repeat_interleave(groups, dim=2) for x in (key, value))
            out, logsumexp, seed, offset, _, _ = aten._efficient_attention_forward(
                query, keys, values, None, boundaries, boundaries, longest, longest, 0.0, _CAUSAL, True
            )
            ctx.save_for_backward(query, key, value, boundaries, out, logsumexp, seed, offset)
            ctx.longest, ctx.groups = longest, groups
            return out

        @staticmethod
        def backward(ctx, grad):
            query, key, value, boundaries, out, logsumexp, seed, offset = ctx.saved_tensors
            keys, values = (x.repeat_interleave(ctx.groups, dim=2) for x in (key, value))
            to_query, to_keys, to_values, _ = aten._efficient_attention_backward(
                grad.contiguous(), query, keys, values, None, out, boundaries, boundaries, ctx.longest, ctx.longest,
                logsumexp, 0.0, seed, offset, _CAUSAL, False,
            )  # fmt: skip
            to_key, to_value = (x.unflatten(2, (-1, ctx.groups)).sum(3) for x in (to_keys, to_values))
            return to_query, to_key, to_value, None, None

    return DocumentAttention


def multiply_4bit(unsloths, pays):
    """What unsloth asks before it unpacks a 4-bit weight for several rows: their product by its own kernel for few rows, else
    by bitsandbytes' fused one where that is faster by `pays`, measured on a T4 and others (its pull request 1949), or None.
    """

    def multiply(rows, weight, quant_state, out):
        from bitsandbytes import matmul_4bit

        few = unsloths(rows, weight, quant_state, out)
        if few is not None or not pays(rows.device.index, rows.dtype, len(rows), *quant_state.shape):
            return few
        return matmul_4bit(rows, weight, quant_state)

    return multiply


def decode_in_graphs(unsloths):
    """Wrap unsloth's pass over one new token for each sequence: several go through a `Decoder`, all else stays with it."""

    def decode(self, input_ids, past_key_values, position_ids, attention_mask=None, **more):
        from transformers.modeling_outputs import BaseModelOutputWithPast
        from unsloth.kernels import fast_linear_forward

        from utils.models.decode_graph import Decoder

        if len(input_ids) == 1 or attention_mask is None or attention_mask.dim() != 2:
            return unsloths(self, input_ids, past_key_values, position_ids, attention_mask=attention_mask, **more)
        decoder, keys = getattr(self.model, "batch_decoder", None), past_key_values[0][0]
        if decoder is None or keys.data_ptr() != decoder.cache[0][0].data_ptr():

            def tables(length):
                rotary = self.model.layers[0].self_attn.rotary_emb
                rotary.extend_rope_embedding(keys, length)
                return rotary.get_cached(length, keys.device.index)

            decoder = self.model.batch_decoder = None  # another batch's: its memory first
            prompts = attention_mask[:, : keys.shape[2]]
            decoder = Decoder(self.model, past_key_values, prompts, fast_linear_forward, tables)
            self.model.batch_decoder = decoder
        states = decoder.step(input_ids, position_ids[:, -1:])
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=decoder.past())

    return decode


def forget_cache(model) -> None:
    """Free the key-value cache that is kept on the modules after `generate`, so that its memory can be counted on."""
    for module in model.modules():
        if hasattr(module, "batch_decoder"):
            del module.batch_decoder
        if hasattr(module, "paged_attention"):
            del module.paged_attention, module.paged_attention_K, module.paged_attention_V
