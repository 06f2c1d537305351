"""What we change in unsloth, for GPUs without flash attention such as a T4; to be retired as unsloth does so by itself.

Training: one launch of the memory-efficient kernel takes all documents of a packed row, where unsloth launches one for each.
Decoding in batches: the query heads of a group are rows of one product, where torch repeats keys and values in float32.
"""

from functools import cache
from importlib.metadata import version

from utils.errors import HardwareError

MADE_FOR = "2026.10.7"  # of unsloth, whose internals these patches replace
_CAUSAL = 1  # aten::_efficient_attention_forward: custom_mask_type, from each document's first token on
_CACHE_STEP = 128  # tokens by which unsloth's cache grows; its 512 takes 64 MiB more of an 8B model for each sequence


def patch_unsloth() -> None:
    """Let unsloth use the functions below, before a model is loaded; raises HardwareError for another unsloth."""
    if (found := version("unsloth")) != MADE_FOR:
        instead = f"install {MADE_FOR}, for which it is patched here, or set hardware.backend=transformers"
        raise HardwareError(f"unsloth {found} is installed; {instead}.")
    from unsloth.models import llama

    if getattr(llama.run_attention, "keeps_documents_apart", False):
        return
    llama.run_attention = choose_attention(llama.run_attention)
    llama.scaled_dot_product_attention = attend_by_groups
    llama.KV_CACHE_INCREMENT = _CACHE_STEP
    attention = free_copied_cache(llama.LlamaAttention_fast_forward_inference)
    llama.LlamaModel_fast_forward_inference = llama._LlamaModel_fast_forward_inference(attention)


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


def attend_by_groups(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False, scale=None):
    """Attention of one new token for each sequence: what `scaled_dot_product_attention` gives, without repeating keys.

    query is (batch, heads, 1, size), key and value (batch, kv_heads, length, size), attn_mask True where to look.
    """
    import torch

    batch, heads, count, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    if count != 1:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, scale=scale
        )
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, size) * (size**-0.5 if scale is None else scale)
    scores = torch.matmul(grouped, key.transpose(-1, -2))
    if attn_mask is not None:
        mask = attn_mask.expand(batch, -1, 1, length)[:, :1]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).reshape(batch, heads, 1, size)


def free_copied_cache(attention):
    """Wrap unsloth's attention so that a prompt's keys and values are freed once the first step has copied them."""

    def attend(self, hidden_states, past_key_value, position_ids, do_prefill=False, **more):
        result = attention(self, hidden_states, past_key_value, position_ids, do_prefill=do_prefill, **more)
        if do_prefill:
            for tensor in past_key_value:
                tensor.untyped_storage().resize_(0)
        return result

    return attend


def forget_cache(model) -> None:
    """Free the key-value cache that unsloth keeps on its modules after `generate`, so that its memory can be counted on."""
    for module in model.modules():
        if hasattr(module, "paged_attention"):
            del module.paged_attention, module.paged_attention_K, module.paged_attention_V
