"""Data: rows and benchmark items, the frozen split, and the text that a model is given."""

from utils import surface

__all__, __getattr__ = surface(
    __name__,
    hub="find_commits",
    rows="write_split write_frame",
    benchmarks="load_benchmarks load_items describe_primary",
    split="split_rows count_units",
    prompts="format_row",
)
