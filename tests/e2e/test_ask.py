"""`python -m utils ask`: both models answer a reader's question, and the run stays as it is."""

from __future__ import annotations

from tests.conftest import run_command
from utils.files import sha256


def digests(folder) -> dict:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_both_models_answer_and_no_file_of_the_run_changes(small_run):
    before = digests(small_run)
    done = run_command("ask", small_run, "A patient has night sweats and a dry cough. What is it?")
    assert done.returncode == 0, done.stderr
    base, tuned = done.stdout.split("--- fine-tuned ---\n")
    assert base.startswith("No medical advice.") and "--- base ---\n" in base and base.count("\n") > 2 and tuned.strip()
    assert digests(small_run) == before
