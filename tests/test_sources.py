"""What no source of ours may do and no linter knows of: trust a model's code, ask a hub for whatever is newest, pass a
keyword that the library does not take. Every rule is shown a piece of code that breaks it. (What ruff knows, pickles and
shells, is in pyproject.toml.)
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator

import nbformat
import pytest

from tests.token_shapes import TokenDetector
from utils.kaggle.bundle import TEMPLATE
from utils.project import NOTEBOOKS, ROOT

HUB = {
    "from_pretrained",
    "load_dataset",
    "snapshot_download",
    "hf_hub_download",
    "model_info",
    "try_to_load_from_cache",
}
LOCAL = {"PeftModel.from_pretrained", "AutoTokenizer.from_pretrained"}  # of an adapter's folder, of an export's
LIBRARIES = ("unsloth", "trl", "peft", "transformers", "datasets", "wandb", "huggingface_hub", "accelerate")


def parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


@functools.cache
def sources() -> dict[str, ast.Module]:
    """{place: tree} of the package, the benchmarks, the notebooks' code cells and the generated kernel's."""
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for folder in ("utils", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    for path in (*NOTEBOOKS.glob("*.ipynb"), TEMPLATE):
        cells = nbformat.read(path, as_version=4).cells
        texts |= {f"notebooks/{path.name}:{cell.id}": cell.source for cell in cells if cell.cell_type == "code"}
    return {name: ast.parse(text) for name, text in texts.items()}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    return ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def given(call: ast.Call) -> dict[str | None, str]:
    return {word.arg: ast.unparse(word.value) for word in call.keywords}


def trusts(tree: ast.AST) -> Iterator[str]:
    """Left out, transformers asks on standard input whether to run the model's code."""
    for what, call in calls(tree):
        asks = what.startswith("Auto") and what.endswith(".from_pretrained")
        if given(call).get("trust_remote_code", "None" if asks else "False") != "False":
            yield what


def takes_the_newest(tree: ast.AST) -> Iterator[str]:
    for what, call in calls(tree):
        asks_a_hub = what.rpartition(".")[2] in HUB and given(call).get("local_files_only") != "True"
        if asks_a_hub and what not in LOCAL and "revision" not in given(call):
            yield what


def bound(tree: ast.AST) -> dict[str, object]:
    """{name: object} of everything imported from LIBRARIES, as far as they are installed here."""
    found = {}
    for node in ast.walk(tree):
        modules = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [getattr(node, "module", "") or ""]
        )
        for module in modules if isinstance(node, ast.Import | ast.ImportFrom) else ():
            library = module.partition(".")[0]
            if library in LIBRARIES and importlib.util.find_spec(library):
                for alias in node.names:
                    part = None if isinstance(node, ast.Import) else alias.name
                    found[alias.asname or alias.name] = (
                        getattr(importlib.import_module(module), part) if part else importlib.import_module(module)
                    )
    return found


def generation_keywords() -> set[str]:
    """What `model.generate` takes: its own, the configuration's, the model's."""
    from transformers import GenerationConfig, LlamaForCausalLM

    own = (LlamaForCausalLM.generate, LlamaForCausalLM.forward)
    return set(vars(GenerationConfig())) | {name for each in own for name in inspect.signature(each).parameters}


def keywords(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """("SFTConfig(max_length)", whether it is taken) of every keyword that can be looked up in an installed library."""
    names = bound(tree)
    for what, call in calls(tree):
        first, *rest = what.split(".")
        if first in names and all(part.isidentifier() for part in rest):
            called = functools.reduce(lambda thing, part: getattr(thing, part, None), rest, names[first])
            parameters = inspect.signature(called).parameters if callable(called) else {}
            if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
                yield from ((f"{what}({word})", word in parameters) for word in given(call) if word)
        elif what.endswith("model.generate"):
            yield from ((f"{what}({word})", word in generation_keywords()) for word in given(call) if word)


def not_taken(tree: ast.AST) -> Iterator[str]:
    return (keyword for keyword, taken in keywords(tree) if not taken)


BROKEN = {
    trusts: ("f(trust_remote_code=True)", "f(trust_remote_code=config.x)", "AutoModel.from_pretrained(p, revision=r)"),
    takes_the_newest: ("A.from_pretrained(p)", "load_dataset(n, split='train')", "hub.snapshot_download(n)"),
    not_taken: (
        "from trl import SFTConfig\nSFTConfig(output_dir='x', max_seq_length=1)",
        "import trl\ntrl.SFTConfig(evaluation_strategy='no')",
        "from trl import SFTTrainer as T\nT(model=m, tokenizer=t)",
        "def f():\n    from peft import LoraConfig\n    return LoraConfig(rank=8)",
        "from datasets import Dataset\nDataset.from_pandas(f, keep_index=False)",
        "import wandb\nwandb.init(anonymos='allow')",
        "self.model.generate(max_tokens=3)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_no_source_breaks_the_rule(rule):
    folders = ("benchmarks/",) if rule is takes_the_newest else ()  # a benchmark's model is a folder
    assert [
        (name, what) for name, tree in sources().items() if not name.startswith(folders) for what in rule(tree)
    ] == []


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in BROKEN.items() for text in texts])
def test_the_rule_finds_what_breaks_it(rule, text):
    assert list(rule(ast.parse(text)))


def test_every_source_and_most_keywords_are_looked_at():
    assert sum(name.startswith("notebooks/") for name in sources()) > 40 and len(sources()) > 100
    looked_at = {keyword for tree in sources().values() for keyword, _ in keywords(tree)}
    assert {"SFTConfig(max_length)", "LoraConfig(target_modules)"} <= looked_at and len(looked_at) > 60


def test_a_notebook_has_no_shell_lines():
    """ruff leaves them out, and papermill runs them."""
    for path in (*NOTEBOOKS.glob("*.ipynb"), TEMPLATE):
        for cell in nbformat.read(path, as_version=4).cells:
            lines = cell.source.split("\n") if cell.cell_type == "code" else ()
            assert not [line for line in lines if line.lstrip().startswith(("!", "%%bash", "%%sh", "%system", "%sx"))]


def test_every_hub_id_in_a_profile_has_a_commit_or_gets_one_in_00():
    """00 pins what a profile leaves open, before anything is loaded from there."""
    from utils.config import load_config

    setup = next(NOTEBOOKS.glob("00_*.ipynb")).read_text()
    assert 'run.pin(\\"model.revision\\", revision)' in setup and "in find_commits(config).items()" in setup
    for profile in sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml")):
        config = load_config(profile, {})
        if config.data.name and config.data.name != "embedded" and config.data.path is None:
            assert config.data.revision and len(config.data.revision) == 40, profile


@pytest.mark.parametrize(
    "text",
    [
        "login('hf_" + "QwErTyUiOpAsDfGhJkLzXc')",
        "TOKEN=KGAT_" + "0f1e" * 4,
        '\\"WANDB_API_KEY = \\"' + "9f8e" * 10,
    ],
)
def test_make_lint_knows_the_shape_of_our_tokens(text):
    assert list(TokenDetector().analyze_string(text))
    assert not list(TokenDetector().analyze_string("the commit of hf_hub_download"))
