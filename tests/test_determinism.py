"""What a run's repeatability rests on is told completely, and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from utils.hardware import describe_determinism, threads
from utils.project import ROOT


def test_it_tells_the_switches_of_the_torch_that_is_loaded():
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        on = json.loads(json.dumps(describe_determinism()))
        torch.use_deterministic_algorithms(False)
        off = describe_determinism()
    finally:
        torch.use_deterministic_algorithms(before)
    assert on["torch"]["deterministic_algorithms"] and not off["torch"]["deterministic_algorithms"]
    assert on["torch"]["threads"] == torch.get_num_threads() and on["torch"]["version"] == torch.__version__
    assert on["torch"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_it_tells_what_the_environment_says_and_loads_no_torch():
    code = "import json; from utils.hardware import describe_determinism as d; print(json.dumps(d()))"
    variables = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3", "PATH": ""}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    told = json.loads(answer.stdout)
    assert told["environment"]["PYTHONHASHSEED"] == "7" and told["environment"]["OMP_NUM_THREADS"] == "3"
    assert told["environment"]["CUBLAS_WORKSPACE_CONFIG"] is None and "torch" not in told and told["processor"]


def test_a_fixed_hash_seed_of_zero_is_told_from_randomised_hashes():
    code = "from utils.hardware import describe_determinism as d; print(d()['hash_randomisation'])"
    for seed, randomised in (("0", "False"), ("random", "True")):
        variables = {"PYTHONHASHSEED": seed, "PATH": ""}
        answer = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
        )
        assert answer.stdout.strip() == randomised


def test_threads_are_as_many_as_asked_for_and_as_many_as_before_afterwards_even_after_an_error():
    import torch

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(before + 3):
        assert torch.get_num_threads() == before + 3
        raise RuntimeError
    assert torch.get_num_threads() == before
