"""The machine: what is found, what is lacking in numbers, and pins that hold or are named."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from utils import hardware as platforms
from utils.errors import HardwareError
from utils.hardware import (
    Gpu,
    check_cuda,
    default_profile,
    describe_determinism,
    free_disk_gib,
    gpus,
    require_disk,
    require_gpu,
    resolve_hardware,
    threads,
)
from utils.project import ROOT
from utils.schema import HardwareSection


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """Put a script called nvidia-smi on an otherwise empty PATH: `nvidia_smi(LINE, …)`; before that there is none."""

    def install(*lines: str, status: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
        script.chmod(0o755)
        gpus.cache_clear()

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus.cache_clear()
    yield install
    gpus.cache_clear()


def test_a_gpu_is_told_by_name_memory_and_capability(nvidia_smi):
    nvidia_smi("NVIDIA T4, 15360, 7.5")
    assert gpus() == (Gpu("NVIDIA T4", 15.0, "7.5"),)
    assert default_profile() == "t4"


def test_kaggles_two_gpus_are_both_told(nvidia_smi):
    nvidia_smi("Tesla T4, 15360, 7.5", "Tesla T4, 15360, 7.5")
    assert len(gpus()) == 2


def test_without_a_driver_there_is_no_gpu_and_the_default_is_the_demo(nvidia_smi):
    assert gpus() == () and default_profile() == "demo"


def test_a_driver_that_fails_counts_as_no_gpu(nvidia_smi):
    nvidia_smi("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver", status=9)
    assert gpus() == ()


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("", []),
        ("-1", []),
        ("0", ["Small"]),
        ("1", ["Large"]),
        ("0,1", ["Small", "Large"]),
        ("1,0", ["Large", "Small"]),
    ],
)
def test_cuda_visible_devices_is_honoured(nvidia_smi, monkeypatch, visible, found):
    nvidia_smi("Small, 2048, 7.5", "Large, 15360, 7.5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in gpus()] == found


def test_a_gpu_is_asked_for_once_only(nvidia_smi):
    nvidia_smi("NVIDIA T4, 15360, 7.5")
    first = gpus()
    assert gpus() is first


@pytest.mark.parametrize(("capability", "dtype"), [("7.5", "float16"), ("9.0", "bfloat16")])
def test_a_gpu_computes_in_bfloat16_where_it_has_it(nvidia_smi, capability, dtype):
    nvidia_smi(f"NVIDIA X, 15360, {capability}")
    assert resolve_hardware(HardwareSection())["dtype"] == dtype


def test_an_emulated_t4_computes_in_float16_as_a_real_one(nvidia_smi):
    nvidia_smi("NVIDIA H200, 143771, 9.0")
    assert resolve_hardware(HardwareSection(emulate_t4=True))["dtype"] == "float16"
    assert resolve_hardware(HardwareSection(emulate_t4=True, dtype="bfloat16"))["dtype"] == "bfloat16"


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions_for_it(monkeypatch, has_bfloat16, dtype):
    monkeypatch.setattr(platforms, "cpu_multiplies_bfloat16", lambda: has_bfloat16)
    assert resolve_hardware(HardwareSection(device="cpu"))["dtype"] == dtype


def test_a_missing_gpu_is_a_sentence_with_a_way_out(nvidia_smi):
    with pytest.raises(HardwareError) as caught:
        require_gpu("t4", 13.5)
    assert str(caught.value) == (
        "The profile t4 needs a CUDA GPU and found none; switch the accelerator to a T4, or take the profile demo, "
        "which needs no GPU."
    )


def test_too_little_gpu_memory_names_both_numbers_and_the_gpu(nvidia_smi):
    nvidia_smi("NVIDIA GeForce GTX 1050, 2048, 6.1")
    with pytest.raises(HardwareError, match=r"needs 13.5 GiB of GPU memory; found 2.0 GiB on NVIDIA GeForce GTX 1050"):
        require_gpu("t4", 13.5)


def test_a_t4_is_enough_for_the_profiles_that_name_it(nvidia_smi):
    nvidia_smi("Tesla T4, 15360, 7.5")
    assert require_gpu("t4", 13.5).name == "Tesla T4"


def test_too_little_disk_names_both_numbers_and_the_place(tmp_path):
    place = tmp_path / "not" / "there" / "yet"
    with pytest.raises(HardwareError) as caught:
        require_disk(place, 1e9, "The profile t4")
    needed, found = re.search(
        r"needs ([\d.]+) GiB of free disk at .*; found ([\d.]+) GiB\.", str(caught.value)
    ).groups()
    assert (float(needed), float(found)) == (1e9, pytest.approx(free_disk_gib(tmp_path), abs=1))
    assert str(place) in str(caught.value) and not place.exists()


def test_enough_disk_is_no_error(tmp_path):
    assert require_disk(tmp_path, 0.001, "A run directory") is None


def test_the_place_is_told_by_kaggles_variable(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert platforms.where() == "kaggle"


@pytest.fixture
def cuda(monkeypatch):
    """`cuda(driver, error)`: two GPUs of that driver, and a torch built for CUDA 13 that fails on them with `error`."""
    import torch

    def arrange(driver: str = "580.65.06", error: Exception | None = None) -> HardwareSection:
        monkeypatch.setattr(platforms, "_ask_driver", lambda fields: [driver])
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if error else 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
        monkeypatch.setattr(platforms, "gpus", lambda: (Gpu("Tesla T4", 15.0, "7.5"),))
        ones = torch.ones

        def compute(*shape, device):
            asked.append(device)
            if error:
                raise error
            return ones(*shape)

        monkeypatch.setattr(torch, "ones", compute)
        return HardwareSection(device="cuda")

    asked = arrange.asked = []
    return arrange


def test_where_a_gpu_is_expected_each_computes_before_anything_is_downloaded(cuda):
    assert check_cuda(cuda()) == "torch 2.13.0+cu130 computes on 2 x Tesla T4" and cuda.asked == ["cuda:0", "cuda:1"]
    assert check_cuda(HardwareSection(device="cpu")) == "no GPU is asked for" and len(cuda.asked) == 2


@pytest.mark.parametrize(("driver", "takes"), [("535.183.01", 12), ("470.57.02", 11)])
def test_a_driver_that_is_too_old_is_named_with_what_to_install_instead(cuda, driver, takes):
    """PyPI's newest torch is built for CUDA 13; nvidia-smi answers with an older driver too."""
    said = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
    with pytest.raises(HardwareError) as caught:
        check_cuda(cuda(driver, RuntimeError(said)))
    assert str(caught.value) == (
        f"torch 2.13.0+cu130, built for CUDA 13.0, cannot compute on this GPU ({said}); the driver {driver} takes builds "
        f"for CUDA {takes}: choose one at pytorch.org/get-started, or update it."
    )


def test_a_build_without_this_gpus_kernels_or_without_cuda_is_told_by_torchs_reason(cuda):
    no_kernel = RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")
    for error in (no_kernel, AssertionError("Torch not compiled with CUDA enabled")):
        with pytest.raises(HardwareError, match=f"cannot compute on this GPU .{str(error).splitlines()[0]}.;"):
            check_cuda(cuda(error=error))


def test_torchs_own_error_without_a_gpu_is_one_of_those_that_are_told(monkeypatch):
    monkeypatch.setattr(platforms, "_ask_driver", lambda fields: [])
    with pytest.raises(
        HardwareError, match=r"cannot compute on this GPU \(.+\); the driver 0 takes builds for CUDA 11"
    ):
        check_cuda(HardwareSection(device="cuda"))


def test_an_absent_package_has_no_version():
    assert platforms.installed("no-such-package-of-ours") is None
    assert platforms.installed("pytest") == pytest.__version__


def test_the_description_of_the_machine_is_plain_json_without_personal_data(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA T4, 15360, 7.5")
    described = platforms.describe()
    assert described["gpus"] == [{"name": "NVIDIA T4", "memory_gib": 15.0, "capability": "7.5"}]
    assert described["memory_gib"] > 0.1 and described["processors"] >= 1
    assert set(described) == {"where", "python", "system", "processors", "memory_gib", "gpus"}


def test_the_peak_memory_of_this_process_is_plausible():
    assert 0.01 < platforms.peak_memory()["rss_gib"] < platforms.describe()["memory_gib"]


def test_provenance_has_the_switches_of_the_torch_that_is_loaded():
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


def test_provenance_has_what_the_environment_says_and_loads_no_torch():
    code = "import json; from utils.hardware import describe_determinism as d; print(json.dumps(d()))"
    variables = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "3", "PATH": ""}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    told = json.loads(answer.stdout)
    assert told["environment"]["PYTHONHASHSEED"] == "7" and told["environment"]["OMP_NUM_THREADS"] == "3"
    assert "torch" not in told and told["processor"]


def test_threads_are_as_many_as_asked_for_and_as_many_as_before_afterwards_even_after_an_error():
    import torch

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(before + 3):
        assert torch.get_num_threads() == before + 3
        raise RuntimeError
    assert torch.get_num_threads() == before
