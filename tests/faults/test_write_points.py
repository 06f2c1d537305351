"""The disk fills up at every single write of every stage, and of the driver: a sentence, and nothing lost."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.series_process import ONE_THREAD
from utils.project import ROOT, python_path

# Every function of `utils` that writes files itself, by where this suite fills the disk under it.
WRITERS = {
    "03": {"training.save_adapter", "training.save_log", "figures._save", "files.write_text"},
    "05": {
        "adapter.copy_adapter", "adapter.save_tokenizer", "adapter.merge_adapter", "merge._merge_shard",
        "compare_logits.save", "files.write_text",
    },
    "04": {
        "generation._append", "likelihood.forced_letters", "data.write_frame", "comparison.write_comparison",
        "figures._save", "answers_page.write_answers_page",
    },
    "01": {"generation._append", "likelihood.forced_letters", "data.write_frame"},
    "00": {"rundir.note", "data.write_split", "data.write_frame", "files.write_json", "lock._lock_file", "rundir.save"},
    "02": {"data.write_frame", "figures._save"},
    "driver": {"state.write_state", "report._write_chapters", "report.write_report", "rundir.save"},
}  # fmt: skip
# And those that write at other times, each with the reason why it is not filled up here.
ELSEWHERE = {
    "lock._sign": "what it cannot write is left out: tests/test_lock.py",
    "merge.merge_shards": "the index of a model in several shards: tests/test_disk.py",
    "generation._set_aside_torn_lines": "after a kill; through files.write_text",
    "progress._tell": "what it cannot write is left out: tests/test_progress.py",
    "launch.write_recipe": "several GPUs; through files.write_text",
    "launch.run_worker": "several GPUs: what the first process prints",
    "workers._launch": "several GPUs: their logs",
    "probe.probe_letters": "evaluate.probe; through files.write_text",
    "gguf.write_gguf": "needs llama.cpp: tests/test_disk.py",
    "verify.answer_elsewhere": "the machine's scratch",
    "gguf.build_llama_cpp": "the machine's cache",
    "demo.build_model": "the machine's cache",
    "install.install_missing": "the machine's scratch",
    "attach.move_large_files": "Kaggle's end of a session: tests/kaggle/test_attach.py",
    "attach.resume_from_attached": "before there is a run: tests/kaggle/test_attach.py",
    "collect.collect": "no run at work: tests/kaggle/test_collect.py",
    "push.write": "no run at work: tests/kaggle/test_push.py",
    "bundle._write": "no run at work",
}
METHODS = {"write_text", "write_bytes", "to_parquet", "to_csv", "savefig", "save_pretrained", "copyfile", "copytree", "move", "pwrite", "write_sealed"}  # fmt: skip


def writers() -> set[str]:
    """module.function of everything in `utils` that calls one of METHODS, shutil.copy, or opens a file to write."""
    found = set()
    for file in sorted((ROOT / "utils").glob("*.py")):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and any(map(_writes, ast.walk(function))):
                found.add(f"{file.stem}.{function.name}")
    return found


def _writes(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    modes = [value.value for value in node.args if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    opens = any(len(mode) <= 3 and set(mode) & set("wax+") for mode in modes) or "O_CREAT" in ast.unparse(node)
    return name in METHODS or (name == "open" and opens) or ast.unparse(node.func) == "shutil.copy"


def test_no_writing_function_of_the_package_is_forgotten():
    assert writers() == set().union(*WRITERS.values(), ELSEWHERE)


def enumerate_points(run: Path, stage: str, scratch: Path, *words: str) -> tuple[list[dict], dict]:
    command = [sys.executable, "-m", "tests.faults.write_points", str(run), stage, str(scratch), *words]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": python_path()}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    *trials, whole = map(json.loads, done.stdout.splitlines())
    return trials, whole


@pytest.mark.parametrize("stage", WRITERS)
def test_full_at_any_write_it_ends_in_a_sentence_and_harms_nothing(small_run, tmp_path, stage, record_fault, long):
    trials, whole = enumerate_points(small_run, stage, tmp_path, *(["continue"] if long else []))
    assert not whole["error"] and not whole["wrong"], whole
    assert WRITERS[stage] <= set(whole["sites"])
    assert len(trials) == len(whole["points"]) > 5
    harmed = [trial for trial in trials if trial["wrong"]]
    name = f"disk full at each write of {stage}" if stage != "driver" else "disk full at each write of the driver"
    record_fault(name, tried=len(trials), survived=len(trials) - len(harmed))
    assert not harmed, json.dumps(harmed, indent=1)[:6000]
