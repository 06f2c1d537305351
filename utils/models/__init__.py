"""Models: the base model with its tokenizer, LoRA on it, and the memory that they take."""

from importlib import import_module

_MODULES = {  # module: its names
    "load": "load_model load_plain add_lora ready_for_inference prepare_device device torch_dtype is_unsloth keep_lora_in_float32 transformer_layers count_fused_layers",
    "tokenizer": "check_model model_source load_tokenizer guard_tokenizer",
    "prompt_format": "make_prompt_format check_training_text tokenize_row count_reasoning",
    "memory": "free_memory free_bytes is_out_of_memory sequences_that_fit",
    "unsloth_patches": "forget_cache",
}
_SURFACE = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_SURFACE)


def __getattr__(name):
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
