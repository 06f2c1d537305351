"""Static tests of the notebooks: each guards against something that broke other people's notebooks."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from utils.pipeline.stages import STAGES
from utils.project import NOTEBOOKS, REF, REPOSITORY, ROOT, prepare
from utils.schema import Config

NAMES = [stage.name for stage in STAGES]


def read(name: str):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(name: str) -> list:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def source_of(name: str) -> str:
    return "\n".join(cell.source for cell in code_cells(name))


def calls(name: str, function: str) -> list[ast.Call]:
    tree = ast.parse(source_of(name))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) == function
    ]


@pytest.mark.parametrize("name", ["01_baseline_inference", "04_comparison"])
def test_batches_are_checked_unless_the_reader_answers_one_by_one(name):
    (call,) = calls(name, "check_batching")
    assert ast.unparse(call.args[-1]) == "config.generate.batch_size"


def test_there_is_one_notebook_for_each_stage_and_no_other():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_every_cell_parses(name):
    nbformat.validate(read(name))
    for cell in code_cells(name):
        ast.parse(cell.source)


@pytest.mark.parametrize("name", NAMES)
def test_no_output_count_or_personal_metadata_is_in_git(name):
    notebook = read(name)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
        assert set(cell.metadata) <= {"tags"}
    assert set(notebook.metadata) == {"accelerator", "colab", "kernelspec", "language_info"}
    assert (notebook.metadata.accelerator, notebook.metadata.colab) == ("GPU", {"gpuType": "T4"})  # Colab opens a T4


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_named_since_kaggle_runs_no_notebook_without_one(name):
    """Kaggle/kaggle-cli issue 689: "No kernel name found in notebook and no override provided"."""
    assert read(name).metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_names_purpose_badges_and_what_it_reads_and_writes(name):
    first = read(name).cells[0].source
    assert first.startswith(f"# {name[:2]} · ")
    assert f"colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb" in first
    assert f"kaggle.com/kernels/welcome?src=https://github.com/{REPOSITORY}/blob/main/notebooks/{name}.ipynb" in first
    assert "| reads | writes |" in first and "@@" not in first


@pytest.mark.parametrize("name", NAMES)
def test_the_last_cell_says_what_comes_next(name):
    last = read(name).cells[-1]
    assert last.cell_type == "markdown" and ".ipynb)" in last.source


def test_the_bootstrap_is_one_short_cell_the_same_in_every_notebook():
    """Six copies of 31 lines were 29 % of all code that a reader met."""
    bootstraps = {code_cells(name)[0].source for name in NAMES}
    assert len(bootstraps) == 1
    assert len(bootstraps.pop().splitlines()) <= 8


def test_cells_tag_and_package_are_of_one_version():
    """A notebook opened alone clones the tag: one raised without the other runs new cells on the old layout."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"v{version}" == REF
    assert f"--branch {REF} https://github.com/{REPOSITORY} " in code_cells("00_setup")[0].source


def bootstrap(folder: Path, repository: str = REPOSITORY, **variables: str) -> subprocess.CompletedProcess:
    """The first cell alone, in an empty folder, with `repository` put in as `make address` does."""
    source = code_cells("03_lora_training")[0].source.replace(REPOSITORY, repository)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SERIES_ROOT")}
    command = [sys.executable, "-c", source + "\nimport utils; print(utils.__file__)"]
    return subprocess.run(
        command, cwd=folder, env=environment | variables, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def github(tmp_path):
    """Variables by which git takes a folder of this disk for github.com/alice/series."""
    rule = {"GIT_CONFIG_KEY_0": f"url.{(tmp_path / 'origin').as_uri()}.insteadOf"}
    return rule | {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": "https://github.com/alice/series"}


def test_anywhere_in_a_checkout_that_checkout_is_taken():
    for folder in (ROOT, ROOT / "notebooks", ROOT / "tests" / "kaggle"):
        assert bootstrap(folder).stdout.strip() == str(ROOT / "utils" / "__init__.py")


def test_from_elsewhere_the_variable_of_our_runner_names_the_checkout(tmp_path):
    assert bootstrap(tmp_path, SERIES_ROOT=str(ROOT)).stdout.strip() == str(ROOT / "utils" / "__init__.py")


def test_papermill_from_another_folder_finds_the_checkout_around_the_notebook(tmp_path):
    """It tells a kernel nothing of the notebook's place; its command line does."""
    checkout = tmp_path / "path" / "to" / "checkout"
    (checkout / "notebooks").mkdir(parents=True)
    (checkout / "utils").symlink_to(ROOT / "utils")
    notebook = read("01_baseline_inference")
    notebook.cells = [code_cells("01_baseline_inference")[0], nbformat.v4.new_code_cell("import utils; utils.__file__")]
    nbformat.write(notebook, checkout / "notebooks" / "01.ipynb")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SERIES_ROOT")}
    words = ["-m", "papermill", "path/to/checkout/notebooks/01.ipynb", "out.ipynb", "--no-progress-bar"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(checkout / "utils" / "__init__.py") in (tmp_path / "out.ipynb").read_text(encoding="utf-8")


def test_opened_alone_without_an_address_one_sentence_says_what_is_missing(tmp_path):
    done = bootstrap(tmp_path, "OWNER/deepseek-r1-medical-lora")
    assert done.returncode == 1 and not list(tmp_path.iterdir())  # OWNER may be somebody's name: nothing is cloned
    assert done.stderr.splitlines()[-1].startswith("AssertionError: no utils/ here, and none from: git clone")


def test_opened_alone_it_clones_the_pinned_ref_and_imports_that(tmp_path, github):
    """A real git clone; a later commit is not taken, and a second time nothing is fetched."""
    origin, empty = tmp_path / "origin", tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(ROOT / "utils", origin / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", REF]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    (origin / "utils" / "__init__.py").write_text("raise RuntimeError('newer than the tag')")
    subprocess.run([*git, "commit", "-qam", "two"], check=True, capture_output=True)
    done = bootstrap(empty, "alice/series", **github)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(empty / "series" / "utils" / "__init__.py")
    assert bootstrap(empty, "alice/series").returncode == 0


def test_a_clone_that_fails_is_a_sentence(tmp_path, github):
    done = bootstrap(tmp_path, "alice/series", **github)
    assert done.returncode == 1 and "none from: git clone" in done.stderr and "github.com/alice/series" in done.stderr


def test_another_package_named_utils_is_told_from_ours(tmp_path, monkeypatch):
    import utils

    monkeypatch.setattr(utils, "SERIES", "something else")
    with pytest.raises(ImportError, match="Another package named utils came first"):
        prepare()


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_import_the_surfaces_of_at_most_four_folders(name):
    """What lies below a folder's `__init__` may be moved without a notebook noticing."""
    tree = ast.parse("\n".join(cell.source for cell in code_cells(name)[1:]))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    ours = {module for module in imported if module.partition(".")[0] == "utils"}
    folders = {module for module in ours if (ROOT / module.replace(".", "/") / "__init__.py").exists()}
    top = {module for module in ours if (ROOT / f"{module.replace('.', '/')}.py").exists() and module.count(".") == 1}
    assert ours <= folders | top, sorted(ours - folders - top)
    assert len(folders) <= 4, sorted(folders)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in folders:
            assert {alias.name for alias in node.names} <= set(importlib.import_module(node.module).__all__)


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_cell_is_tagged_once_and_holds_literals_only(name):
    """papermill replaces values and computes nothing anew: a derived value would keep its old inputs."""
    tagged = [cell for cell in read(name).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0] is not None
    assert code_cells(name)[1].source == tagged[0].source
    values = {}
    for node in ast.parse(tagged[0].source).body:
        assert isinstance(node, ast.Assign)
        values[node.targets[0].id] = ast.literal_eval(node.value)
    assert values == {"PROFILE": "auto", "RUN_DIR": "", "OVERRIDES": {}}


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_opens_and_finishes_as_itself(name):
    (opened,) = calls(name, "open_stage")
    assert opened.args[0].value == name
    assert len(calls(name, "finish")) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_no_shell_line_no_switch_and_no_token_is_written_into_a_cell(name):
    """unslothai/notebooks: `!cmd &` loses errors, `if False:` hides code, "YOUR_HF_TOKEN" invites a paste into git."""
    text = source_of(name)
    assert not re.search(r"(?m)^\s*[!%]", text)
    assert "if False" not in text and "if True" not in text
    assert not re.search(r"(?i)your_?(hf|wandb)|hf_[A-Za-z0-9]{20}|login\(", text)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_a_cell_reads_exists(name):
    sections = {field: info.annotation for field, info in Config.model_fields.items()}
    for section, key in re.findall(r"\bconfig\.(\w+)(?:\.(\w+))?", source_of(name)):
        assert section in sections or hasattr(Config, section), section
        if key and section in sections and hasattr(sections[section], "model_fields"):
            assert key in sections[section].model_fields, f"{section}.{key}"


RECIPE = "03-09"  # the trainer's arguments, written out: what the reader came for


@pytest.mark.parametrize("name", NAMES)
def test_no_code_cell_but_the_recipe_is_longer_than_20_lines(name):
    long = [cell.id for cell in code_cells(name) if len(cell.source.splitlines()) > 20]
    assert set(long) <= {RECIPE}


def test_the_trainers_arguments_exist_in_the_pinned_trl():
    """transformers 5 dropped warmup_ratio, group_by_length and others: a keyword that is gone is a TypeError at hour one."""
    from trl import SFTConfig, SFTTrainer

    for function in (SFTConfig, SFTTrainer):
        (call,) = calls("03_lora_training", function.__name__)
        known = inspect.signature(function.__init__).parameters
        assert [k.arg for k in call.keywords if k.arg not in known] == []


def test_the_lora_arguments_exist_in_the_pinned_peft():
    from peft import LoraConfig

    (call,) = calls("03_lora_training", "add_lora")
    known = inspect.signature(LoraConfig.__init__).parameters
    assert [k.arg for k in call.keywords if k.arg not in known] == []
