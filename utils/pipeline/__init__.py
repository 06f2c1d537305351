"""A run: its directory, its six stages, and the driver that executes them."""

from importlib import import_module
from typing import Any

_SURFACE = {"open_stage": "stage", "open_run": "run_dir", "STAGES": "stages"}  # name: module
__all__ = list(_SURFACE)


def __getattr__(name: str) -> Any:
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
