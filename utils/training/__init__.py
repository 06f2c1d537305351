"""Training: `train_adapter(run, load_with_lora, make_trainer)` is all that notebook 03 needs."""

from importlib import import_module

_SURFACE = {"train_adapter": "launch"}  # not `train`: importing the module of that name would replace it here
__all__ = list(_SURFACE)


def __getattr__(name):
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
