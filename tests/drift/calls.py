"""Every call of ours into another library, with its keywords: read from the source, never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from tests.sources import sources

LIBRARIES = (
    "unsloth",
    "unsloth_zoo",
    "trl",
    "peft",
    "transformers",
    "datasets",
    "wandb",
    "huggingface_hub",
    "kaggle",
    "kagglesdk",
)
# What a variable of this name holds, here as there: for each, any of the classes may answer.
HOLDS = {
    "trainer": ("trl.SFTTrainer",),
    "model": ("peft.PeftModel", "transformers.LlamaForCausalLM"),
    "tokenizer": ("transformers.PreTrainedTokenizerBase",),
    "api": ("huggingface_hub.HfApi",),
    "_wandb_run": ("wandb.Run",),
}
# Functions of ours that hand their keywords on: (library's callable, those that it is not given).
HANDS_ON = {
    "add_lora": (
        ("peft.LoraConfig", frozenset()),
        ("unsloth.FastLanguageModel.get_peft_model", frozenset({"task_type"})),
    ),
}


@dataclass(frozen=True)
class Call:
    """One keyword at one place; `targets` are dotted names, of which one has to take it. `**` stands for a spread mapping."""

    place: str
    targets: tuple[str, ...]
    keyword: str


def find_calls() -> list[Call]:
    """All of ours: package, notebooks and generated cells."""
    return [call for place, source in sources(("utils",)) for call in calls_in(place, source)]


def calls_in(place: str, source: str) -> Iterator[Call]:
    """The keywords in one source, in its order; calls whose receiver is nobody known are left out."""
    tree = ast.parse(source)
    bound = bindings(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        where = f"{place}:{node.lineno}"
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        groups = [((target,), left_out) for target, left_out in HANDS_ON.get(name, ())] or [
            (resolve(node.func, bound), frozenset())
        ]
        for targets, left_out in groups:
            for word in node.keywords if targets else ():
                if word.arg not in left_out:
                    yield Call(where, targets, word.arg or "**")


def bindings(tree: ast.AST) -> dict[str, str]:
    """{name: dotted name} of everything imported from LIBRARIES."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in LIBRARIES:
                    found[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def resolve(func: ast.expr, bound: dict[str, str]) -> tuple[str, ...]:
    """The dotted names that a call may mean; empty where it is none of the libraries'."""
    parts = dotted(func)
    if parts and parts[0] in bound:
        return (".".join([bound[parts[0]], *parts[1:]]),)
    if isinstance(func, ast.Attribute):
        receiver = func.value
        last = receiver.attr if isinstance(receiver, ast.Attribute) else getattr(receiver, "id", "")
        if ast.unparse(receiver).endswith("config.model"):  # a section of ours
            return ()
        return tuple(f"{kind}.{func.attr}" for kind in HOLDS.get(last, ()))
    if isinstance(func, ast.Name) and func.id in HOLDS:
        return tuple(f"{kind}.{'__call__' if func.id == 'tokenizer' else 'forward'}" for kind in HOLDS[func.id])
    return ()


def dotted(node: ast.expr) -> list[str]:
    """["a", "b"] of `a.b`; empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return [*before, node.attr]
    return []
