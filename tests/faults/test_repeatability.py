"""Two runs on one machine are one run: split, answers, adapter, metrics and exports to the byte, and why is on record."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import run_command
from tests.faults.series_process import ONE_THREAD, SETTINGS
from utils.files import sha256
from utils.pipeline.stages import STAGES

# What a run says; nothing of when, where and how fast.
RESULTS = (
    "data/train.parquet", "data/eval.parquet", "data/benchmark.jsonl", "data/split.json", "data/registration.json",
    "data/formatted/train.parquet", "training/adapter/adapter_model.safetensors", "training/adapter/tokenizer.json", "training/adapter/adapter_config.json",
    "training/log.csv", "baseline/answers.jsonl", "baseline/forced.jsonl", "baseline/nll.parquet", "tuned/answers.jsonl",
    "tuned/forced.jsonl", "tuned/nll.parquet", "comparison/metrics.json", "comparison/table.csv",
    "export/adapter/adapter_model.safetensors", "export/adapter/adapter_config.json", "export/merged/model.safetensors",
)  # fmt: skip


def test_the_whole_demo_twice_gives_the_same_hashes(tmp_path, long, fault, request):
    """The second with other hashes of strings, in another folder: nothing may rest on the order of a set or on a path."""
    if not long:
        pytest.skip("in make faults; test_chains.py compares the small demo's results")
    first, again = request.getfixturevalue("demo_run").path, tmp_path / "another place" / "run"
    fault("the same run again", tried=len(RESULTS))
    done = run_command("run", "--profile", "demo", "--run-dir", again, PYTHONHASHSEED="11")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name in RESULTS if sha256(first / name) != sha256(again / name)] == []


def test_another_seed_gives_another_adapter_of_the_same_split(small_run, tmp_path, long):
    """The control: hashes that are the same for every run would say nothing."""
    if not long:
        pytest.skip("in make faults: three more stages")
    other = tmp_path / "run"
    words = ("run", "--profile", "demo", "--run-dir", other, "--to", "03", *SETTINGS, "--set", "train.seed=1")
    done = run_command(*words, **ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sha256(other / "data/eval.parquet") == sha256(small_run / "data/eval.parquet")
    adapter = "training/adapter/adapter_model.safetensors"
    assert sha256(other / adapter) != sha256(small_run / adapter)


def test_the_manifest_says_what_the_numbers_rest_on(small_run):
    import torch

    manifest = json.loads((small_run / "manifest.json").read_text())
    for stage in STAGES:
        record = manifest["stages"][stage.name]
        rests_on = record["provenance"]
        assert {"data.seed", "train.seed", "generate.seed", "evaluate.seed"} <= set(rests_on["seeds"])
        assert rests_on["processor"] and rests_on["environment"]["OMP_NUM_THREADS"] == "1"
        assert re.fullmatch(r"3\.\d+\.\d+", rests_on["python"]) and rests_on["packages"]["numpy"]
        assert record["versions"]["transformers"] and len(record["sources"]) == 64
    switches = manifest["stages"]["03_lora_training"]["provenance"]["torch"]
    assert switches["threads"] == 1 and switches["version"] == torch.__version__
    assert switches["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert switches["deterministic_algorithms"] in (True, False)
