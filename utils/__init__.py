"""Shared plumbing of the notebook series; `utils.project.prepare` asserts by `SERIES` that it is this package."""

import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

SERIES = "deepseek-r1-medical-lora"

# torch reads it once, when it is loaded. Its threads wait for each other by spinning, which on a shared or busy machine takes
# the time from those that work: two trainings at once on two cores took 13 s each instead of 28, one alone as long as before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# An image's older kernels warn, at every start, of a debugger that nobody asked for.
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each fork warns
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm without widgets draws text, which is fine
warnings.filterwarnings("ignore", message=".*Unsloth should be imported")  # trl comes first; 03 counts fused layers


def surface(package: str, **modules: str) -> tuple[list[str], Callable[[str], Any]]:
    """(`__all__`, `__getattr__`) of a folder, whose names are loaded when first asked for; {module: names, by spaces}."""
    places = {name: module for module, names in modules.items() for name in names.split()}

    def load(name: str) -> Any:
        if name in places:
            return getattr(import_module(f"{package}.{places[name]}"), name)
        raise AttributeError(name)

    return list(places), load
