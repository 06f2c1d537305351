"""A token that a library puts into its exception, a log or an output is told to nobody and written nowhere."""

from __future__ import annotations

import json
import subprocess
import sys

import nbformat
import pytest

from tests import fake_tokens
from tests.loopback import series_call
from utils.project import ROOT

TOKENS = {
    "HF_TOKEN": fake_tokens.hugging_face("environment"),
    "WANDB_API_KEY": fake_tokens.wandb("environment"),
    "KAGGLE_KEY": fake_tokens.kaggle_key("environment"),
    "KAGGLE_API_TOKEN": fake_tokens.kaggle_token("environment"),
}


def told(text: str) -> list[str]:
    return [name for name, value in TOKENS.items() if value in text]


@pytest.fixture
def tokens(monkeypatch):
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)


def test_no_secret_is_in_what_a_notebook_prints_shows_or_dies_of(tokens, tmp_path, monkeypatch, fault):
    import papermill

    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # under it a kernel does not show what its children print
    shows = {
        "printed": "print(secret)",
        "to stderr": "import sys; print(secret, file=sys.stderr)",
        "by a child": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; print(os.environ)'], check=True)",
        "logged": "import logging; logging.getLogger('x').error('token %s', secret)",
        "warned": "import warnings; warnings.warn(secret)",
        "shown": "from IPython.display import HTML, display; display(HTML(f'<b>{secret}</b>'))",
        "result": "{'value': (secret,)}",
        "raised": "raise ValueError(f\"Illegal header value b'Bearer {secret}'\")",
    }
    cells = [
        nbformat.v4.new_code_cell(
            "import os\nfrom utils.pipeline.stage import open_stage\n"
            f"open_stage('00_setup', 'demo', {str(tmp_path / 'run')!r})\nsecret = ' '.join(os.environ[n] for n in {list(TOKENS)})"
        ),
        *(nbformat.v4.new_code_cell(source) for source in shows.values()),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "in.ipynb")
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", cwd=ROOT, progress_bar=False
        )
    saved = [cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.cell_type == "code"][-len(shows) :]
    leaks = {name: told(json.dumps(cell)) for name, cell in zip(shows, saved, strict=True) if told(json.dumps(cell))}
    leaks |= {"exception": told(str(caught.value))} if told(str(caught.value)) else {}
    fault("secrets in what is printed or raised", tried=len(shows))
    silent = [name for name, cell in zip(shows, saved, strict=True) if "***" not in json.dumps(cell)]
    assert leaks == {} and silent == [], str(caught.value)
    assert told((tmp_path / "out.ipynb").read_text(encoding="utf-8")) == []


def test_no_secret_is_in_what_the_command_line_prints_or_dies_of(tokens, fault):
    code = """
import os, sys
from utils import __main__
names = {names}
secret = " ".join(os.environ[name] for name in names)
def app():
    print(secret)
    print(secret, file=sys.stderr)
    __main__.console.print(secret)
    raise {kind}(secret)
__main__.app = app
__main__.main()
"""
    for kind in ("RuntimeError", "__main__.UserError"):
        source = code.format(names=list(TOKENS), kind=kind)
        done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
        leaks = told(done.stdout + done.stderr)
        fault("secrets in what is printed or raised", tried=4)
        assert done.returncode == 1 and leaks == [] and done.stdout.count("***") == 8, done
        assert "*** *** *** ***" in done.stderr and kind.rpartition(".")[2] in done.stderr


def test_no_secret_is_in_the_error_that_a_training_process_leaves(tokens, training_run, monkeypatch, fault):
    from utils.errors import TrainingError
    from utils.training import launch

    run = training_run()

    def fail(_):
        raise TrainingError(f"refused: {' '.join(TOKENS.values())}")

    monkeypatch.setattr(launch, "read_recipe", fail)
    with pytest.raises(TrainingError):
        launch.run_worker(str(run.path))
    text = run.file("training/error.json").read_text(encoding="utf-8")
    fault("secrets in what is printed or raised")
    assert told(text) == [] and text.count("***") == 4


def test_no_secret_is_in_the_log_and_the_sentence_that_a_kernel_brings_home(kaggle_server, tmp_path, fault):
    kaggle_server.statuses = [{"status": "error", "failureMessage": ""}]
    trace = f"Traceback\nhttpx.LocalProtocolError: Illegal header value b'Bearer {TOKENS['HF_TOKEN']}'\n{TOKENS['KAGGLE_API_TOKEN']}\nValueError: {' '.join(TOKENS.values())}\n"
    kaggle_server.log = json.dumps([{"stream_name": "stderr", "time": 1.0, "data": trace}])
    (tmp_path / "home").mkdir()
    done = series_call(
        kaggle_server, tmp_path / "home", "collect", "alice/series", "--run-dir", tmp_path / "here", **TOKENS
    )
    text = (tmp_path / "here" / "series.log").read_text() + done.stdout + done.stderr
    fault("secrets in what is printed or raised")
    assert told(text) == [] and "Bearer ***" in text and "ValueError: *** *** *** ***" in done.stdout


def test_tokens_that_are_not_ours_are_known_by_their_shape_and_commits_are_left_alone(monkeypatch):
    from utils.secrets import redact

    for value in (TOKENS["HF_TOKEN"], TOKENS["KAGGLE_API_TOKEN"], "wandb_v1_" + "AbCdEfGhIjKlMnOpQrStUvWx"):
        assert redact(f"a {value}, b") == "a ***, b"
    assert redact("authorization: Basic " + "YWxpY2U6MDEyMzQ1Njc4OWFi") == "authorization: Basic ***"
    medical = ("Basic electrophysiology shows", "basic self-care/hygiene", "the bearer immunohistochemistry")
    for harmless in ("fc2c" * 10, "hf_hub_download", "a" * 64, *medical):
        assert redact(harmless) == harmless
