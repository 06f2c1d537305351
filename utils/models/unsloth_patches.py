"""Attention that keeps packed documents apart, on GPUs without flash attention, such as a T4.

Several rows share one packed sequence, and none may see another. Where flash attention is out of reach and no xformers
build loads with the torch that is there, unsloth 2026.10.7 launches one kernel for each document and pads gradients back
together; here one launch of the memory-efficient kernel (the one behind `scaled_dot_product_attention`, from compute
capability 5.0 on) takes all documents by their boundaries, and grouped keys are repeated only while it runs. Where
xformers loads, it is left at work. To be retired when unsloth does so by itself.
"""

from __future__ import annotations

from functools import cache

_CAUSAL = 1  # aten::_efficient_attention_forward: custom_mask_type, from each document's first token on


def keep_documents_apart() -> None:
    """Let unsloth's training attention use `attend_within_documents` where it has no flash attention for it."""
    from unsloth.models import llama

    if not getattr(llama.run_attention, "keeps_documents_apart", False):
        llama.run_attention = choose_attention(llama.run_attention)


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
    """Causal attention within each document of one packed row, on CUDA in half precision.

    query is (1, tokens, heads, size), key and value (1, tokens, kv_heads, size); `boundaries` (int32, documents + 1) holds
    where each document begins and the last one ends, `longest` the tokens of the longest. Returns query's shape.
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
