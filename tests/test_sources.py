"""What no source of ours may do: unpickle, trust a model's code, start a shell, ask a hub for whatever is newest.

Each rule is shown a piece of code that breaks it: a rule that finds nothing anywhere would look the same.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import nbformat
import pytest

from tests.sources import sources
from utils.project import NOTEBOOKS

PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn",
          "asyncio.create_subprocess_shell", "os.execlp", "os.spawnlp"}  # fmt: skip
PROCESSES = {
    "subprocess.run",
    "subprocess.Popen",
    "subprocess.call",
    "subprocess.check_call",
    "subprocess.check_output",
}
HUB = {
    "from_pretrained",
    "load_dataset",
    "snapshot_download",
    "hf_hub_download",
    "model_info",
    "try_to_load_from_cache",
}
LOCAL = {  # (file, call): it takes a folder of ours and asks no hub
    ("utils/models/load.py", "PeftModel.from_pretrained"),
    ("utils/export/verify.py", "PeftModel.from_pretrained"),
    ("utils/export/verify.py", "AutoTokenizer.from_pretrained"),
}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def literal(call: ast.Call, keyword: str) -> object:
    """A keyword's literal value; None where it is not given, `...` where it is no literal."""
    value = next((word.value for word in call.keywords if word.arg == keyword), None)
    return value.value if isinstance(value, ast.Constant) else None if value is None else ...


def unpickles(name: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (module for module in modules if module.split(".")[0] in PICKLES)
    for call in calls(tree):
        what = called(call)
        if what == "torch.load" and literal(call, "weights_only") is not True:
            yield f"{what} without weights_only=True"
        if what.rpartition(".")[2] == "read_pickle" or literal(call, "allow_pickle"):
            yield what
        if what in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield what
        if (
            what in ("eval", "exec", "compile") and name != "benchmarks/recipe.py"
        ):  # which runs our own notebook's cells
            yield what


def trusts(name: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"trust_remote_code={ast.unparse(node.value)}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "trust_remote_code=True" in node.value:
            yield "trust_remote_code=True in a text"
    for call in calls(tree):  # left out, transformers asks on standard input
        what = called(call)
        asks = what.startswith("Auto") and what.endswith(".from_pretrained")
        if asks and literal(call, "trust_remote_code") is not False:
            yield f"{what} without trust_remote_code=False"


def starts_a_shell(name: str, tree: ast.AST) -> Iterator[str]:
    for call in calls(tree):
        what = called(call)
        if what in SHELLS:
            yield what
        if what in PROCESSES:
            if literal(call, "shell") is not None and literal(call, "shell") is not False:
                yield f"{what} with a shell"
            if not call.args or isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
                yield f"{what} with a command that is no list"
    for node in ast.walk(tree):
        if isinstance(node, ast.List) and any(
            isinstance(e, ast.Constant) and e.value in ("sh", "bash", "/bin/sh", "/bin/bash", "cmd") for e in node.elts
        ):
            yield "a shell in a list"


def takes_the_newest(name: str, tree: ast.AST) -> Iterator[str]:
    for call in calls(tree):
        local = name.startswith("benchmarks/") or (name, called(call)) in LOCAL  # a benchmark's model is a folder
        if called(call).rpartition(".")[2] in HUB and not local and "revision" not in {w.arg for w in call.keywords}:
            yield f"{called(call)} without revision"


RULES: dict[Callable, tuple[str, ...]] = {
    unpickles: (
        "import pickle", "from joblib import load", "import torch\ntorch.load(p)", "torch.load(p, weights_only=False)",
        "numpy.load(p, allow_pickle=True)", "pd.read_pickle(p)", "yaml.load(s)", "eval(s)",
    ),
    trusts: (
        "f(trust_remote_code=True)", "f(trust_remote_code=config.x)", "x = 'AutoModel(trust_remote_code=True)'",
        "AutoModel.from_pretrained(p, revision=r)",
    ),
    starts_a_shell: (
        "os.system('ls')", "subprocess.run(c, shell=True)", "subprocess.run('ls -l')", "subprocess.Popen(f'ls {x}')",
        "subprocess.run(['bash', '-c', x])", "subprocess.run(c, shell=config.x)",
    ),
    takes_the_newest: ("A.from_pretrained(p)", "load_dataset(n, split='train')", "hub.snapshot_download(n)"),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_source_breaks_the_rule(rule):
    broken = [f"{name}: {what}" for name, source in sources() for what in rule(name, ast.parse(source))]
    assert broken == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [(rule, source) for rule, bad in RULES.items() for source in bad],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_the_rule_finds_what_breaks_it(rule, source):
    assert list(rule("utils/planted.py", ast.parse(source)))


def test_every_source_is_looked_at():
    names = [name for name, _ in sources()]
    assert {"utils/models/load.py", "benchmarks/train.py"} <= set(names)
    assert sum(name.startswith("notebooks/") for name in names) > 50


def test_a_notebook_has_no_shell_lines():
    lines = [line.strip() for name, source in sources() if name.startswith("notebooks/") for line in source.split("\n")]
    assert not [line for line in lines if line.startswith(("!", "%%bash", "%%sh", "%%!", "%system", "%sx"))]


def test_every_hub_id_in_a_profile_has_a_commit_or_gets_one_in_00():
    """00 pins what a profile leaves open, before anything is loaded from there."""
    from utils.config import load_config

    (setup,) = [p for p in NOTEBOOKS.glob("00_*.ipynb")]
    text = "\n".join(cell.source for cell in nbformat.read(setup, as_version=4).cells if cell.cell_type == "code")
    assert 'run.pin("model.revision", revision)' in text and "for key, commit in find_commits(config).items()" in text
    for profile in sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml")):
        config = load_config(profile, {})
        if config.data.name and config.data.name != "embedded" and config.data.path is None:
            assert config.data.revision and len(config.data.revision) == 40, profile
