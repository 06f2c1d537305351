"""Kaggle: push the series there, bring its runs home (the command line), and both ends of a session (a kernel's cells)."""

from importlib import import_module

_SURFACE = {"resume_from_attached": "attach", "finish_session": "attach", "move_large_files": "attach"}  # name: module
__all__ = list(_SURFACE)


def __getattr__(name):
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
