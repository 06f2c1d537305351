"""Data: rows and benchmark items, the frozen split, and the text that a model is given."""

from importlib import import_module

_MODULES = {  # module: its names
    "rows": "load_rows find_commits read_table read_benchmark write_split write_frame",
    "benchmarks": "load_benchmarks load_items describe_primary",
    "split": "split_rows count_units",
    "prompts": "format_prompt format_row format_multiple_choice",
}
_SURFACE = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_SURFACE)


def __getattr__(name):
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
