"""Every source of ours, for the tests that read it rather than run it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import nbformat

from utils.kaggle import kernel_cells
from utils.project import NOTEBOOKS, ROOT


def sources(folders: tuple[str, ...] = ("utils", "benchmarks")) -> Iterator[tuple[str, str]]:
    """(name, source) of every module in `folders`, of every notebook's code cells and of the generated cells."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                yield f"notebooks/{path.name}:{cell.id}", cell.source
    for name, text in vars(kernel_cells).items():
        if name.isupper() and isinstance(text, str) and parses(text := text.replace("@LISTING@", "#")):
            yield f"utils/kaggle/kernel_cells.py:{name}", text


def parses(text: str) -> bool:
    """Whether `text` is Python, and no prose."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
