"""Device memory: how much is free, how many sequences fit into it, and what running out looks like."""

import gc

import psutil

from utils.hardware import GIB
from utils.models.unsloth_patches import forget_cache

_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_KEEP_FREE_GIB = 0.75  # fragmentation, the allocator's rounding, and 4-bit layers unpacked on the fly
_MOST_ROWS = {"cuda": 256, "cpu": 80}  # beyond this a step takes as much longer as it answers more


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a RuntimeError means that the device had no memory left."""
    return any(sign in str(error) for sign in _NO_MEMORY)


def free_memory(model=None) -> None:
    """Hand what nobody refers to any more back to the driver, and what `model` kept of its last batch."""
    import torch

    if model is not None:
        forget_cache(model)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device) -> int:
    """What a torch device can still allocate, what torch holds in reserve included, in bytes."""
    import torch

    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - torch.cuda.memory_reserved(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(max(0, min(free, allowed) + idle - _KEEP_FREE_GIB * GIB))


def bytes_per_sequence(config, prompt_tokens: int, new_tokens: int, dtype_bytes: int) -> int:
    """What one sequence takes at its peak while a batch is generated, in bytes.

    The peak is the prompt's forward pass (activations of one layer beside the cache so far) or the last step (the whole
    cache). Measured on 8B shapes without unsloth: 61 MiB for a prompt of 256 tokens and few new ones, 305 for 1,272.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * head_size * dtype_bytes
    active = dtype_bytes * (3 * config.intermediate_size + 4 * config.hidden_size)
    cache = cached * (prompt_tokens + new_tokens + 128)  # it grows in steps of 128 tokens
    sampling = 64 * config.vocab_size  # logits, and what sorting and summing them for top-p takes
    return int(1.05 * max(prompt_tokens * (cached + active), cache)) + sampling


def sequences_that_fit(model, prompt_tokens: int, new_tokens: int) -> int:
    """How many prompts of this length can be continued at once on the model's device; at least 1."""
    import torch

    forget_cache(model)
    torch.cuda.empty_cache()  # pieces of the last batch's blocks may be too small for the next one's
    each = bytes_per_sequence(model.config, prompt_tokens, new_tokens, model.dtype.itemsize)
    return max(1, min(_MOST_ROWS[model.device.type], free_bytes(model.device) // each))
