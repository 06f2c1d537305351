"""Models: the base model with its tokenizer, LoRA on it, and the memory that they take."""

from utils import surface

__all__, __getattr__ = surface(
    __name__,
    load="load_model add_lora torch_dtype is_unsloth keep_lora_in_float32",
    tokenizer="check_model model_source load_tokenizer",
    prompt_format="make_prompt_format check_training_text tokenize_row",
)
