"""Models: the base model with its tokenizer, LoRA on it, and the memory that they take."""

from importlib import import_module

_SURFACE = {  # name: module
    "load_model": "load",
    "load_plain": "load",
    "add_lora": "load",
    "ready_for_inference": "load",
    "prepare_device": "load",
    "device": "load",
    "torch_dtype": "load",
    "is_unsloth": "load",
    "keep_lora_in_float32": "load",
    "transformer_layers": "load",
    "count_fused_layers": "load",
    "check_model": "tokenizer",
    "model_source": "tokenizer",
    "load_tokenizer": "tokenizer",
    "guard_tokenizer": "tokenizer",
    "make_prompt_format": "prompt_format",
    "check_training_text": "prompt_format",
    "tokenize_row": "prompt_format",
    "count_reasoning": "prompt_format",
    "free_memory": "memory",
    "free_bytes": "memory",
    "is_out_of_memory": "memory",
    "sequences_that_fit": "memory",
    "forget_cache": "unsloth_patches",
}
__all__ = list(_SURFACE)


def __getattr__(name):
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
