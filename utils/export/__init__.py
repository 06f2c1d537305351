"""Files that others can load, and the proof that they are what was trained."""

from utils import surface

__all__, __getattr__ = surface(
    __name__,
    adapter="copy_adapter merge_adapter",
    plan="plan_exports",
    gguf="write_gguf",
    verify="write_reference verify_exports write_record",
    model_card="write_cards",
    hub="push_to_hub",
)
