"""Imports go one way (docs/development.md): a folder knows only those before it, and nothing heavy loads by accident."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from utils.project import ROOT

ORDER = ["", "pipeline", "data", "models", "evaluation", "report", "training", "export", "kaggle", "__main__"]
LIGHT = {"", "pipeline", "data", "kaggle"}  # folders that must import without torch
HEAVY = {"torch", "transformers", "unsloth", "trl", "peft", "datasets", "bitsandbytes", "wandb", "lm_eval"}


def folder_of(dotted: str, package: Path) -> str:
    """The folder that `utils.x.y` belongs to; "" for a module at the top."""
    first = dotted.split(".")[1] if "." in dotted else ""
    return first if first == "__main__" or (package / first / "__init__.py").exists() else ""


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "utils":
            yield from (f"utils.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def violations(package: Path) -> list[str]:
    """Every import that goes up, or loads something heavy where nothing heavy may be, as "file imports name"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        own = "__main__" if place.name == "__main__.py" else place.parts[0] if len(place.parts) > 1 else ""
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name in imports(tree):
            if name.startswith("utils") and ORDER.index(folder_of(name, package)) > ORDER.index(own):
                found.append(f"{place} imports {name}, which stands above it")
        if own in LIGHT:
            top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            heavy = {name.split(".")[0] for node in top for name in imports(node)} & HEAVY
            found += [f"{place} imports {name} when it is imported" for name in sorted(heavy)]
    return found


def test_imports_go_one_way_and_a_planted_one_is_found(tmp_path):
    assert violations(ROOT / "utils") == []
    (tmp_path / "data").mkdir()
    (tmp_path / "training").mkdir()
    for file in ("data/__init__.py", "training/__init__.py"):
        (tmp_path / file).write_text("")
    (tmp_path / "data/rows.py").write_text("import torch\nfrom utils.training import train\n")
    assert len(violations(tmp_path)) == 2
