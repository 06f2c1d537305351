"""Files that others can load, and the proof that they are what was trained."""

from importlib import import_module

_SURFACE = {
    "copy_adapter": "adapter",
    "merge_adapter": "adapter",
    "write_gguf": "gguf",
    "write_reference": "verify",
    "verify_exports": "verify",
    "write_cards": "model_card",
    "write_record": "verify",
}  # name: module
__all__ = list(_SURFACE)


def __getattr__(name: str):
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
