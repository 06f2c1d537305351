"""Attention by groups is torch's own attention, in every shape and mask that decoding asks for."""

from __future__ import annotations

import pytest
import torch

from utils.models.decoding import attend_by_groups, forget_cache, free_copied_cache


def tensors(batch: int = 3, heads: int = 8, kv_heads: int = 2, length: int = 17, size: int = 16, count: int = 1):
    torch.manual_seed(0)
    query = torch.randn(batch, heads, count, size)
    # As unsloth keeps them: (length, 2, batch, kv_heads, size), of which keys and values are views.
    cache = torch.randn(length, 2, batch, kv_heads, size)
    return query, cache[:, 0].permute(1, 2, 0, 3), cache[:, 1].permute(1, 2, 0, 3)


def left_padding(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    for row in range(batch):
        mask[row, ..., : 2 * row] = False
    return mask


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_it_is_scaled_dot_product_attention(kv_heads, masked):
    query, key, value = tensors(kv_heads=kv_heads)
    mask = None if masked is None else left_padding(3, 17)
    if masked == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend_by_groups(query, key, value, attn_mask=mask, enable_gqa=True), expected)


def test_several_new_tokens_go_to_torch():
    query, key, value = tensors(count=17)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend_by_groups(query, key, value, is_causal=True, enable_gqa=True), expected)


def test_half_precision_does_not_overflow_where_the_product_before_scaling_would():
    query, key, value = (tensor.half() * 60 for tensor in tensors(size=128))
    assert torch.isfinite(attend_by_groups(query, key, value, enable_gqa=True)).all()


def test_the_cache_that_unsloth_leaves_on_its_modules_is_freed():
    layer = torch.nn.Linear(2, 2)
    layer.paged_attention = layer.paged_attention_K = layer.paged_attention_V = torch.zeros(3)
    model = torch.nn.Sequential(layer, torch.nn.ReLU())
    forget_cache(model)
    assert not hasattr(layer, "paged_attention") and not hasattr(layer, "paged_attention_V")
    forget_cache(model)  # and nothing to free is no error


@pytest.mark.parametrize("first", [True, False])
def test_a_prompts_keys_are_freed_after_the_first_step_only(first):
    keys, values = torch.ones(2, 3), torch.ones(2, 3)
    attend = free_copied_cache(lambda self, hidden, past, position, do_prefill=False, **more: (past[0].sum(), more))
    total, more = attend(None, None, (keys, values), None, do_prefill=first, attention_mask=7)
    assert float(total) == 6 and more == {"attention_mask": 7}
    assert (keys.untyped_storage().size() == 0) is first
