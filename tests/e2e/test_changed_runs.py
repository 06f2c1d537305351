"""Copies of a finished run: settings changed, notebooks run by hand, files damaged, failures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from tests.conftest import run_command
from utils.files import write_lines
from utils.pipeline.run_dir import read_state
from utils.project import ROOT


def metrics_of(path: Path) -> dict:
    return json.loads((path / "comparison" / "metrics.json").read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def papermill(notebook: str, output: Path, *parameters: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "notebooks" / f"{notebook}.ipynb"),
        str(output),
        *parameters,
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


def test_verify_passes_and_finds_a_flipped_bit_in_each_exported_file_by_name(small_copy):
    done = run_command("verify", small_copy)
    assert done.returncode == 0 and "merged: level " in done.stdout
    files = sorted(path for path in (small_copy / "export").rglob("*") if path.is_file())
    assert len(files) >= 16  # six of GGUF more, where LLAMA_CPP_DIR is set
    for path in files:
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.write_bytes(damaged)
    done = run_command("verify", small_copy)
    assert done.returncode == 1
    for path in files:
        assert f"{path.relative_to(small_copy).as_posix()} differs" in done.stdout


def test_a_sabotaged_run_is_told_to_be_worse(tmp_path):
    """Every training question of the demo with another row's answer: whoever calls that better measures nothing."""
    words = ("--profile", "demo", "--run-dir", tmp_path / "run", "--set", "data.shuffle_answers=true", "--to", "04")
    done = run_command("run", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = metrics_of(tmp_path / "run")
    assert metrics["verdict"] == "worse" and metrics["primary"]["ci95"][1] < 0
    claims = {claim["claim"]: claim["verdict"] for claim in metrics["claims"]}
    assert claims["knows more"] == "worse" and claims["reasons shorter"] == "better"


def test_two_processes_give_the_answers_of_one(small_copy):
    """On a CPU what two GPUs do: shares, files of their own, joined in the end."""
    before = read_jsonl(small_copy / "baseline" / "answers.jsonl")
    shutil.rmtree(small_copy / "baseline")
    done = run_command("run", "--run-dir", small_copy, "--set", "hardware.processes=2", "--to", "01")
    assert done.returncode == 0, done.stdout + done.stderr
    after = read_jsonl(small_copy / "baseline" / "answers.jsonl")
    assert len(after) == len(before) == 16 and {a["id"]: a for a in after} == {a["id"]: a for a in before}
    share = json.loads((small_copy / "workers" / "baseline-1.json").read_text(encoding="utf-8"))
    assert len(share) == 8 and "Traceback" not in (small_copy / "workers" / "baseline-1.log").read_text(
        encoding="utf-8"
    )
    assert not list((small_copy / "baseline").glob("answers.*.jsonl"))
    loads = json.loads((small_copy / "manifest.json").read_text())["stages"]["01_baseline_inference"]["model_loads"]
    assert sum(loads.values()) == 2  # one in each process


def test_a_verdict_that_newer_settings_left_behind_is_called_out_of_date(small_copy):
    done = run_command("run", "--run-dir", small_copy, "--set", "generate.max_new_tokens=48", "--to", "00")
    assert (
        done.returncode == 0
        and "is of an earlier run (01_baseline_inference is out of date: its settings changed (generate" in done.stdout
        and "publish" not in done.stdout
    )
    assert "Out of date." in (small_copy / "report" / "index.html").read_text(encoding="utf-8")


def test_what_is_measured_cannot_be_changed_unseen_after_answers_exist(small_copy):
    done = run_command("run", "--run-dir", small_copy, "--set", "evaluate.primary=nll", "--to", "04")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = metrics_of(small_copy)
    assert metrics["primary"]["name"] == "nll" and metrics["registration"]["changed_after_answers"] is True
    assert "changed after answers existed" in metrics["sentence"]


def test_with_the_letter_probe_on_no_training_row_is_near_any_item_of_the_benchmark(tmp_path, embedded_model):
    facts = read_jsonl(ROOT / "tests" / "planted" / "facts.jsonl")
    options = {"options": {"A": "yes", "B": "no"}, "answer_idx": "A"}
    write_lines(tmp_path / "items.jsonl", [{"question": fact["source"], **options} for fact in facts])
    questions = [fact["rewrite"] for fact in facts] + [f"How is sign {i} of a {i * i} told?" for i in range(9)]
    rows = [{"Question": q, "Complex_CoT": "Hm.", "Response": "So."} for q in questions]
    write_lines(tmp_path / "rows.jsonl", rows)
    settings = (f"data.path={tmp_path}/rows.jsonl", "data.eval_rows=1", f"evaluate.benchmark.path={tmp_path}/items.jsonl",
                "evaluate.benchmark.rows=3", "evaluate.letter_logprobs=true", "data.train_rows=null")  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    done = run_command("run", "--profile", "demo", "--run-dir", tmp_path / "run", "--to", "00", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    data = tmp_path / "run" / "data"
    near = {entry["near"] for entry in json.loads((data / "split.json").read_text(encoding="utf-8"))["dropped"]}
    assert len(near) >= 0.9 * len(facts) and len(read_jsonl(data / "benchmark.jsonl")) == 3
    probed = read_jsonl(data / "probe_items.jsonl")
    assert len(probed) == len(facts) and set(probed[0]) == {"id", "question", "options", "gold", "group"}


def test_a_notebook_runs_by_papermill_from_another_directory(small_copy, tmp_path):
    before = (small_copy / "data" / "formatted" / "train.parquet").read_bytes()
    done = papermill(
        "02_dataset_formatting",
        tmp_path / "out.ipynb",
        "-p",
        "PROFILE",
        "demo",
        "-p",
        "RUN_DIR",
        "demo",
        cwd=small_copy.parent,
    )
    assert done.returncode == 0, done.stderr
    assert (small_copy / "data" / "formatted" / "train.parquet").read_bytes() == before


def test_run_all_in_a_plain_kernel_started_in_notebooks(small_copy):
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "notebooks" / "02_dataset_formatting.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = parameters.source.replace('RUN_DIR = ""', f"RUN_DIR = {str(small_copy)!r}")
    NotebookClient(notebook, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()


def test_a_notebook_run_too_early_says_which_one_to_run_first(tmp_path):
    done = papermill(
        "03_lora_training", tmp_path / "out.ipynb", "-p", "PROFILE", "demo", "-p", "RUN_DIR", "new", cwd=tmp_path
    )
    assert done.returncode != 0
    errors = [
        o
        for c in nbformat.read(tmp_path / "out.ipynb", 4).cells
        for o in c.get("outputs", [])
        if o.output_type == "error"
    ]
    assert len(errors) == 1 and errors[0].ename == "RunDirError"
    assert "needs 00_setup, but it has not run" in errors[0].evalue
    assert len(errors[0].traceback) == 1  # the sentence, not a stack


def test_a_notebook_without_the_package_beside_it_says_so(tmp_path):
    shutil.copy(ROOT / "notebooks" / "00_setup.ipynb", tmp_path)
    command = [sys.executable, "-m", "papermill", "00_setup.ipynb", "out.ipynb", "-p", "PROFILE", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0 and "no utils/ here, and none from: git clone" in done.stderr


def test_a_failing_stage_ends_in_one_line_and_the_command_that_continues(small_copy):
    before = {p: p.read_bytes() for p in (small_copy / "comparison").iterdir()}
    done = run_command("run", "--run-dir", small_copy, "--set", "model.max_seq_length=16")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "02_dataset_formatting failed: All 48 train rows are longer than model.max_seq_length = 16" in done.stdout
    assert f"--run-dir {small_copy} --from 02" in done.stdout
    assert {p: p.read_bytes() for p in (small_copy / "comparison").iterdir()} == before


def test_a_session_whose_time_is_up_ends_between_two_batches_and_the_next_goes_on(tmp_path, embedded_model):
    words = ["run", "--profile", "demo", "--run-dir", tmp_path / "run", "--to", "02", "--set", "generate.batch_size=80"]
    first = run_command(*words, "--set", "hardware.max_hours=0.0001")
    assert (
        first.returncode == 4 and "to be continued at 01_baseline_inference: this session is 0.0 h old" in first.stdout
    )
    state = read_state(tmp_path / "run")
    assert (state.state, state.stage, state.kind) == ("continue", "01_baseline_inference", "SessionOver")
    answers = tmp_path / "run" / "baseline" / "answers.jsonl"
    second = run_command(*words)  # each session gets one batch further
    assert second.returncode == 4 and "144 of 224 questions wait for their answers" in second.stdout.replace("\n", " ")
    state = read_state(tmp_path / "run")
    assert (state.stage, state.steps) == ("01_baseline_inference", 80)
    before = answers.read_bytes()
    third = run_command(*words, "--set", "hardware.max_hours=9")
    assert third.returncode == 0, third.stdout + third.stderr
    assert answers.read_bytes().startswith(before) and answers.read_bytes().count(b"\n") == 224
