"""The command line's mistakes end in one sentence and exit status 1, before anything is written."""

from __future__ import annotations

import pytest

from tests.conftest import run_command


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--profile", "demmo"],
            "There is no profile 'demmo'; there are demo, full, local24, smollm2, t4, t4-quick, tutorial.",
        ),
        (["--profile", "[/b]"], "There is no profile '[/b]'; there are"),  # square brackets are no markup
        (["--set", "train.learning_rat=1"], "train.learning_rat is not a setting; did you mean train.learning_rate?"),
        (["--set", "train.learning_rate=-1"], "train.learning_rate is -1: input should be greater than 0"),
        (["--set", "train.max_steps"], "'train.max_steps' is not KEY=VALUE"),
        (["--from", "09"], "There is no stage '09'; there are 00 to 05."),
        (["--from", "04", "--to", "02"], "--from 04 comes after --to 02"),
    ],
)
def test_a_wrong_word_is_a_sentence_and_nothing_is_written(words, sentence, tmp_path):
    profile = [] if "--profile" in words else ["--profile", "demo"]
    done = run_command("run", *profile, "--run-dir", tmp_path / "run", *words)
    assert done.returncode == 1
    assert sentence in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_score_and_verify_ask_for_a_run_directory(tmp_path):
    for command in ("score", "verify"):
        done = run_command(command, tmp_path)
        assert done.returncode == 1 and "is no run directory" in done.stderr


def test_a_missing_data_file_is_told_before_any_notebook_starts(tmp_path):
    done = run_command("run", "--profile", "demo", "--run-dir", tmp_path / "run", "--set", "data.path=nowhere.jsonl")
    assert done.returncode == 1 and "There is no data file" in done.stdout + done.stderr


def test_a_profile_that_needs_a_gpu_says_so_where_there_is_none(tmp_path):
    done = run_command("run", "--profile", "t4", "--run-dir", tmp_path / "run", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "00_setup failed: The profile t4 needs a CUDA GPU and found none" in done.stdout
