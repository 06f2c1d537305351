"""A folder's surface: the names that notebooks import from it, each loaded when it is first asked for."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def surface(package: str, **modules: str) -> tuple[list[str], Callable[[str], Any]]:
    """(`__all__`, `__getattr__`) of `package`, for {module: its names, with spaces between}."""
    places = {name: module for module, names in modules.items() for name in names.split()}

    def load(name: str) -> Any:
        if name in places:
            return getattr(import_module(f"{package}.{places[name]}"), name)
        raise AttributeError(name)

    return list(places), load
