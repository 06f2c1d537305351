"""Imports go down only, and nothing heavy is imported at the top of a module below the model layer (design)."""

from __future__ import annotations

import ast

import pytest

from utils.project import ROOT

GROUND = (
    "errors files progress project stages settings config platforms install credentials rundir tracking state "
    "deadline inputs retry disk manifest stage_run determinism redaction sealed lock interruption notebook".split()
)
PURE = (
    "fit demo_data shards serving prompts parsing metrics results statistics verdicts similarity data items split answers "
    "probe_results".split()
)
MODELS = "pretrained bases decoding packing demo llama_cpp memory merge models sampling".split()
WORK = (
    "callbacks checkpoints trial launch generation probe selftest likelihood workers comparison forest figures training export "
    "agreement loadback verification gguf_files card card_facts report answers_page handover publish".split()
)
DRIVERS = "live_line summary kernels series kernel_cells kernel_schema bundle kaggle_api push collect chain remote __main__".split()
LAYERS = [GROUND, PURE, MODELS, WORK, DRIVERS]
HEAVY = {"torch", "transformers", "unsloth", "trl", "peft", "datasets", "bitsandbytes", "wandb", "lm_eval"}
MODULES = sorted(path.stem for path in (ROOT / "utils").glob("*.py") if path.stem != "__init__")


def level(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


def imported(module: str, top_only: bool) -> set[str]:
    tree = ast.parse((ROOT / "utils" / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "utils":
            names |= {f"utils.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_every_module_has_its_layer():
    assert sorted(name for layer in LAYERS for name in layer) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_layer_and_those_below(module):
    ours = {name.split(".")[1] for name in imported(module, top_only=False) if name.startswith("utils.")}
    assert {name for name in ours if level(name) > level(module)} == set()


@pytest.mark.parametrize("module", [name for layer in (GROUND, PURE, MODELS) for name in layer])
def test_nothing_heavy_is_imported_at_the_top_below_the_work(module):
    assert {name.split(".")[0] for name in imported(module, top_only=True)} & HEAVY == set()
