"""What `make lint` says about vulnerable packages and committed secrets, without a network."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import audit, secret_scan
from utils.files import write_json
from utils.project import ROOT


@pytest.fixture
def checkout(tmp_path):
    """A git repository with a requirements file of two commits, a year apart."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    for days, text in (
        (400, "six==1.16.0\nold==1.0  # why\n"),
        (3, "six==1.17.0\nold==1.0  # why\ntorch>=2.10,<2.15\n"),
    ):
        (tmp_path / "requirements.txt").write_text(text)
        moment = f"{int(time.time()) - days * 86400 - 60} +0000"
        subprocess.run([*git, "add", "requirements.txt"], check=True)
        dates = {**os.environ, "GIT_AUTHOR_DATE": moment, "GIT_COMMITTER_DATE": moment}
        subprocess.run([*git, "commit", "-qm", "x"], check=True, env=dates)
    return tmp_path


def run(strict: bool = False):
    import typer

    app = typer.Typer()
    app.command()(audit.main)
    return CliRunner().invoke(app, ["--strict"] if strict else [])


def test_the_age_of_a_pin_is_that_of_its_own_line(checkout):
    assert audit.ages("requirements.txt", checkout) == {"six": 3, "old": 400, "torch": 3}
    assert audit.ages("requirements.txt", checkout.parent) == {}


def test_without_an_advisory_source_the_age_is_told_and_that_nothing_was_looked_up(monkeypatch):
    monkeypatch.setattr(audit, "osv_answers", lambda: False)
    monkeypatch.setattr(audit, "ages", lambda name: {"six": 3, "old": 400} if name == "requirements.txt" else {})
    told = run()
    assert told.exit_code == 0 and "nothing was looked up" in told.output
    assert "pinned more than 180 days ago: old" in told.output and "the oldest of 2 pins is 400 days old" in told.output
    assert run(strict=True).exit_code == 1


def test_an_advisory_is_a_row_of_the_table_and_ends_a_strict_audit(monkeypatch):
    advisory = {"id": "PYSEC-2030-1", "fix_versions": ["1.18.0"], "aliases": [], "description": ""}
    answer = {
        "dependencies": [
            {"name": "six", "version": "1.17.0", "vulns": [advisory]},
            {"name": "a", "version": "1", "vulns": []},
        ]
    }
    monkeypatch.setattr(audit, "osv_answers", lambda: True)
    monkeypatch.setattr(audit, "ask_advisories", lambda pins: audit.read_answer(answer))
    told = run()
    assert told.exit_code == 0 and "PYSEC-2030-1" in told.output and "1.18.0" in told.output
    assert "against osv's advisories, 1 findings" in told.output
    assert run(strict=True).exit_code == 1


@pytest.mark.parametrize("written", [None, "<html>503</html>", '{"dependencies": [{"name": "six"', '{"error": 429}'])
def test_a_pip_audit_that_fails_is_told_in_the_last_line_after_the_pins_age(monkeypatch, written):
    """The probe answered, and then there was a rate limit, or the service went down."""

    def fail(command, **_):
        if written is not None:
            Path(command[command.index("--output") + 1]).write_text(written)
        return subprocess.CompletedProcess(command, 1, "", "Traceback\n429 Client Error: Too Many Requests [osv]\n")

    monkeypatch.setattr(audit, "_within", lambda ask: True)
    monkeypatch.setattr(audit, "ages", lambda name: {"six": 3, "old": 400} if name == "requirements.txt" else {})
    monkeypatch.setattr(audit.subprocess, "run", fail)
    told = run()
    assert told.exit_code == 0 and not told.exception, told.output
    last = told.output.splitlines()[-1]
    assert last.startswith(
        "audit: pip-audit failed (429 Client Error: Too Many Requests [osv]), nothing was looked up;"
    )
    assert "pinned more than 180 days ago: old" in told.output and "is 400 days old" in last
    assert run(strict=True).exit_code == 1


def test_no_address_but_the_advisories_own_is_in_the_audit():
    text = (ROOT / "tests" / "audit.py").read_text(encoding="utf-8")
    assert re.findall(r"https?://([^/\"]+)", text) == ["api.osv.dev"]


def test_a_source_that_does_not_answer_costs_no_more_than_the_limit(monkeypatch):
    started = time.monotonic()
    assert not audit._within(lambda: time.sleep(5) or True, seconds=0.05)
    assert audit._within(lambda: True) and not audit._within(lambda: 1 / 0)
    assert time.monotonic() - started < 3


def test_every_exact_pin_is_asked_for():
    pins = audit.exact_pins()
    assert pins["transformers"] and pins["pytest"] and pins["torch"] and len(pins) > 35


def test_pip_audit_takes_our_call(monkeypatch, tmp_path):
    """Its own command line, with a service that nobody answers: it fails for that and for no argument."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError) as caught:
        audit.ask_advisories({"six": "1.17.0"})
    assert "usage" not in str(caught.value) and "argument" not in str(caught.value), caught.value


PLANTED = {
    "hub.py": 'login("hf_' + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTy" + '")\n',
    "kaggle.env": "KAGGLE_API_TOKEN=KGAT_" + "0f1e2d3c4b5a69788796a5b4c3d2e1f0" + "\n",
    "aws.yaml": "key: AKIA" + "QYLPMN5HFIQR7XYA" + "\n",
    "notebook.ipynb": '{"source": "WANDB_API_KEY = \\"' + "9f8e7d6c5b4a39281706f5e4d3c2b1a098765432" + '\\""}\n',
}


def test_a_planted_secret_is_found_and_prose_is_not(tmp_path):
    for name, text in {**PLANTED, "harmless.md": "the commit of hf_hub_download\nkey: value\n"}.items():
        (tmp_path / name).write_text(text)
    found = {file for file, *_ in secret_scan.scan([*PLANTED, "harmless.md"], tmp_path)}
    assert found == set(PLANTED)


def test_what_is_not_on_the_list_ends_the_scan_and_names_the_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "hub.py").write_text("\n" + PLANTED["hub.py"])
    (tmp_path / "aws.yaml").write_text(PLANTED["aws.yaml"])
    known = secret_scan.scan(["aws.yaml"], tmp_path)
    write_json(tmp_path / "known.json", sorted(map(list, known)))
    monkeypatch.setattr(secret_scan, "BASELINE", tmp_path / "known.json")
    found = {**known, **secret_scan.scan(["hub.py"], tmp_path)}
    monkeypatch.setattr(secret_scan, "scan", lambda names: found)
    with pytest.raises(secret_scan.typer.Exit) as ended:
        secret_scan.main()
    told = capsys.readouterr().out
    assert ended.value.exit_code == 1 and "hub.py:2: Hub, Kaggle or wandb token" in told and "aws.yaml" not in told


def test_the_scan_looks_at_what_would_be_committed():
    names = secret_scan.tracked()
    assert {"utils/secrets.py", "notebooks/03_lora_training.ipynb", "README.md"} <= set(names)
    assert not any(name.startswith((".venv", "runs/")) for name in names)


def test_lint_runs_both():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    lint = text[text.index("lint:") :].split("\n\n")[0]
    assert "-m tests.secret_scan" in lint and "-m tests.audit" in lint
