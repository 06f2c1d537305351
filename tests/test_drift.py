"""Every keyword that we pass to another library exists there, and the checker that says so finds one that does not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.drift import __main__ as drift
from tests.drift.calls import Call, calls_in, find_calls
from tests.drift.signatures import Sources
from utils.hardware import installed

# What takes any keyword, and why that is all right.
UNCHECKED = {
    "huggingface_hub.ModelCard.from_template",  # the words of our own template
    "huggingface_hub.ModelCardData",  # base_model_relation: the Hub's own key, which the class hands on
    "transformers.PreTrainedTokenizerFast",  # special tokens, by whatever name
    "peft.PeftModel.zero_grad",  # torch's
}


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    return find_calls()


@pytest.fixture(scope="module")
def here() -> Sources:
    """The source of what is installed: everything but unsloth, which needs a GPU."""
    return Sources.installed([package for package in drift.PACKAGES if not package.startswith("unsloth")])


def test_every_keyword_exists_in_the_pinned_versions(calls):
    _, signatures = drift.pinned_signatures()
    unknown = sorted({target for call in calls for target in call.targets} - set(signatures))
    assert unknown == [], "run python -m tests.drift pin"
    said = {call: drift.verdict(call, signatures) for call in calls}
    assert [call for call, word in said.items() if word in ("missing", "no such name")] == []
    unchecked = {call.targets[0] for call, word in said.items() if word == "unchecked" and call.keyword != "**"}
    assert unchecked <= UNCHECKED
    assert sum(word == "ok" for word in said.values()) > 0.8 * len(said)


def test_the_signatures_on_file_are_those_of_the_pins():
    versions, _ = drift.pinned_signatures()
    assert {name: versions[name] for name in drift.PACKAGES if name != "kagglesdk"} == {
        name: version for name, version in drift.pinned_versions().items() if name != "kagglesdk"
    }, "run python -m tests.drift pin"


def test_the_signatures_on_file_are_those_of_the_installed_source(calls, here):
    versions, signatures = drift.pinned_signatures()
    for package in here.packages:
        assert installed(package) == versions[package], package
    checked = 0
    for name, found in drift.read_signatures(here, calls).items():
        if not name.startswith("unsloth"):
            assert found == signatures[name], name
            checked += 1
    assert checked > 30


@pytest.mark.parametrize(
    ("source", "keyword"),
    [
        ("from trl import SFTConfig\nSFTConfig(output_dir='x', max_seq_length=1)", "max_seq_length"),
        ("import trl\ntrl.SFTConfig(evaluation_strategy='no')", "evaluation_strategy"),
        ("from trl import SFTTrainer as T\nT(model=m, tokenizer=t)", "tokenizer"),
        ("def f():\n    from peft import LoraConfig\n    return LoraConfig(rank=8)", "rank"),
        ("add_lora(model, config, r=8, lora_alfa=8)", "lora_alfa"),
        ("trainer.train(resume=True)", "resume"),
        ("import wandb\nwandb.init(anonymos='allow')", "anonymos"),
        ("import wandb\nwandb.init(settings=wandb.Settings(init_timeouts=3))", "init_timeouts"),
        ("from datasets import Dataset\nDataset.from_pandas(f, keep_index=False)", "keep_index"),
        ("from huggingface_hub import snapshot_download\nsnapshot_download('x', patterns=[])", "patterns"),
        ("from huggingface_hub import model_info\nmodel_info('x', metadata=True)", "metadata"),
        ("api.create_repo('x', privat=True)", "privat"),
    ],
)
def test_a_planted_wrong_keyword_is_found(source, keyword, here):
    planted = list(calls_in("planted.py", source))
    signatures = drift.read_signatures(here, planted) | {"unsloth.FastLanguageModel.get_peft_model": None}
    said = {call.keyword: drift.verdict(call, signatures) for call in planted if "peft_model" not in call.targets[0]}
    assert said.pop(keyword) == "missing" and set(said.values()) <= {"ok"}


def test_a_name_that_is_gone_is_found(here):
    planted = list(calls_in("planted.py", "from transformers import Tokeniser\nTokeniser(a=1)\ntrainer.fit(epochs=1)"))
    signatures = drift.read_signatures(here, planted)
    assert next(drift.verdict(call, signatures) for call in planted) == "no such name"


OLD = {
    "lib/__init__.py": "from ._lazy import export\nif x:\n    from .core import *\n_import_structure = {'core': ['Config']}\n",
    "lib/core.py": """
from dataclasses import dataclass, field
from typing import ClassVar
from base import Parent
class Config_(Parent): pass
@dataclass
class Config(Parent):
    rate: float = 1.0
    kind: ClassVar[str] = ""
    made: int = field(init=False, default=0)
Alias = Config
class Api:
    def ask(self, name, *, revision=None): ...
api = Api()
ask = api.ask
def spread(first, **options):
    options.pop("second", None)
    options["third"]
    return options.get("fourth")
""",
    "base/__init__.py": "class Parent:\n    seed: int = 0\n    def go(self, steps=1): ...\n",
}  # fmt: skip


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str], requires: tuple[str, ...] = ()) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, text in files.items():
            wheel.writestr(inside, text)
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", "Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
    return path


def test_signatures_are_read_through_every_way_of_offering_a_name(tmp_path):
    sources = Sources.of_wheels([make_wheel(tmp_path, "lib", "1", OLD)])
    config = sources.find("lib.Config")
    assert config.names == {"rate", "seed"} and not config.open
    assert sources.find("lib.core.Alias") == config
    assert sources.find("lib.Config.go").names == {"steps"}
    assert sources.find("lib.core.ask").names == {"name", "revision"}
    spread = sources.find("lib.core.spread")
    assert spread.names == {"first", "second", "third", "fourth"} and spread.open
    assert sources.find("lib.Gone") is None and sources.find("lib.Config.gone") is None


def test_the_newest_versions_are_those_that_fit_together(tmp_path, monkeypatch):
    asked = {}
    requires = {
        "unsloth": ("transformers<=5.17,!=5.2", 'trl<2; extra == "x"'),
        "transformers": ("huggingface-hub>=1.3,<2",),
    }

    def fetch(package, allowed, folder):
        asked[package] = allowed
        return make_wheel(folder, package, "9", {}, requires.get(package, ()))

    monkeypatch.setattr(drift, "fetch", fetch)
    drift.fetch_newest(tmp_path)
    assert asked["transformers"] in ("!=5.2,<=5.17", "<=5.17,!=5.2") and asked["huggingface_hub"] in (
        "<2,>=1.3",
        ">=1.3,<2",
    )
    assert asked["trl"] == "" and list(asked) == list(drift.PACKAGES)
    drift.fetch_newest(tmp_path, together=False)
    assert set(asked.values()) == {""}


def test_the_table_says_what_an_upgrade_would_break(tmp_path, monkeypatch):
    call = Call("notebooks/03.ipynb:03-09:9", ("trl.SFTConfig",), "max_length")
    monkeypatch.setattr(drift, "find_calls", lambda: [call])

    def newest(folder, together):
        new = "class SFTConfig:\n    def __init__(self, maximum_length=1): ...\n"
        return [
            make_wheel(folder, name, "99", {"trl/__init__.py": new} if name == "trl" else {}) for name in drift.PACKAGES
        ]

    monkeypatch.setattr(drift, "fetch_newest", newest)
    told = CliRunner().invoke(drift.app, [], env={"COLUMNS": "200"})
    assert told.exit_code == 1 and "1 would break" in told.output
    (row,) = [line for line in told.output.splitlines() if "03-09" in line]
    assert "trl.SFTConfig" in row and "max_length" in row and row.index(" ok ") < row.index("missing")


def test_pip_is_asked_as_pip_wants_it(tmp_path, capsys, monkeypatch):
    """A package that cannot be there: pip answers, with its own sentence and no usage error."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(drift.typer.Exit) as ended:
        drift.fetch("trl", "==0.0.0.dev0", tmp_path)
    assert ended.value.exit_code == 3
    told = capsys.readouterr().err
    assert "No matching distribution" in told or "Could not find a version" in told
