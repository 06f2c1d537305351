"""Data: rows and benchmark items, the frozen split, and the text that a model is given."""

from importlib import import_module

_SURFACE = {  # name: module
    "load_rows": "rows",
    "load_benchmarks": "benchmarks",
    "load_items": "benchmarks",
    "describe_primary": "benchmarks",
    "find_commits": "rows",
    "read_table": "rows",
    "read_benchmark": "rows",
    "split_rows": "split",
    "count_units": "split",
    "write_split": "rows",
    "write_frame": "rows",
    "format_prompt": "prompts",
    "format_row": "prompts",
    "format_multiple_choice": "prompts",
}
__all__ = list(_SURFACE)


def __getattr__(name):
    if name in _SURFACE:
        return getattr(import_module(f"{__name__}.{_SURFACE[name]}"), name)
    raise AttributeError(name)
