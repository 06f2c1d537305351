"""Every source of ours, for the tests that read it rather than run it."""

from __future__ import annotations

from collections.abc import Iterator

import nbformat

from utils.kaggle.bundle import TEMPLATE
from utils.project import NOTEBOOKS, ROOT


def sources(folders: tuple[str, ...] = ("utils", "benchmarks")) -> Iterator[tuple[str, str]]:
    """(name, source) of every module in `folders`, of every notebook's code cells and of the generated cells."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in (*sorted(NOTEBOOKS.glob("*.ipynb")), TEMPLATE):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                yield f"notebooks/{path.name}:{cell.id}", cell.source
