"""Two runs on one machine are one run: split, answers, adapter, metrics and exports to the byte, and why is on record."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import run_command
from tests.faults.series_process import ONE_THREAD, SMALL
from utils.files import sha256
from utils.pipeline.stages import STAGES

pytestmark = pytest.mark.series
# What a run says; nothing of when, where and how fast.
RESULTS = (
    "data/train.parquet", "data/eval.parquet", "data/benchmark.jsonl", "data/split.json", "data/registration.json",
    "data/formatted/train.parquet", "training/adapter/adapter_model.safetensors", "training/adapter/tokenizer.json", "training/adapter/adapter_config.json",
    "training/log.csv", "baseline/answers.jsonl", "baseline/forced.jsonl", "baseline/nll.parquet", "tuned/answers.jsonl",
    "tuned/forced.jsonl", "tuned/nll.parquet", "comparison/metrics.json", "comparison/table.csv",
    "export/adapter/adapter_model.safetensors", "export/adapter/adapter_config.json", "export/merged/model.safetensors",
)  # fmt: skip


def results(run: Path) -> dict[str, str]:
    """{file: sha256} of what a run found out."""
    return {name: sha256(run / name) for name in RESULTS}


def run_small(path: Path, **variables: str) -> None:
    options = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    done = run_command("run", "--profile", "demo", "--run-dir", path, *options, **ONE_THREAD, **variables)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_runs_on_one_machine_give_the_same_hashes(small_run, tmp_path, record_fault):
    """The second with other hashes of strings, in another folder: nothing may rest on the order of a set or on a path."""
    again = tmp_path / "another place" / "run"
    run_small(again, PYTHONHASHSEED="11")
    first, second = results(small_run), results(again)
    same = [name for name in RESULTS if first[name] == second[name]]
    record_fault("the same run again (small demo)", tried=len(RESULTS), survived=len(same))
    assert [name for name in RESULTS if name not in same] == []
    told = [
        json.loads((run / "manifest.json").read_text())["stages"]["03_lora_training"]["provenance"]
        for run in (small_run, again)
    ]
    assert told[1]["environment"].pop("PYTHONHASHSEED") == "11"
    told[0]["environment"].pop("PYTHONHASHSEED")
    assert told[0] == told[1]


def test_another_seed_gives_another_adapter_of_the_same_split(small_run, tmp_path, long):
    """The control: hashes that are the same for every run would say nothing."""
    if not long:
        pytest.skip("only in make faults: three more stages")
    other = tmp_path / "run"
    options = [word for key, value in {**SMALL, "train.seed": 1}.items() for word in ("--set", f"{key}={value}")]
    done = run_command("run", "--profile", "demo", "--run-dir", other, "--to", "03", *options, **ONE_THREAD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sha256(other / "data/eval.parquet") == sha256(small_run / "data/eval.parquet")
    adapter = "training/adapter/adapter_model.safetensors"
    assert sha256(other / adapter) != sha256(small_run / adapter)


def test_the_whole_demo_twice_gives_the_same_hashes(tmp_path, long, record_fault, request):
    if not long:
        pytest.skip("only in make faults: a second whole demo takes more than a minute")
    demo_run = request.getfixturevalue("demo_run")
    again = tmp_path / "run"
    done = run_command("run", "--profile", "demo", "--run-dir", again, PYTHONHASHSEED="11")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = results(demo_run.path), results(again)
    same = [name for name in RESULTS if first[name] == second[name]]
    record_fault("the same run again (whole demo)", tried=len(RESULTS), survived=len(same))
    assert [name for name in RESULTS if name not in same] == []


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
