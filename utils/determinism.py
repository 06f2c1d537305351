"""What a run's repeatability rests on besides its seeds and versions: switches, threads, processor and GPU."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from utils.hardware import gpus, installed

_PACKAGES = (
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "scikit-learn",
    "sparse_dot_topn",
    "statsmodels",
)
_ENVIRONMENT = (
    "PYTHONHASHSEED",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "GOMP_SPINCOUNT",
    "TOKENIZERS_PARALLELISM",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
)  # fmt: skip


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch inside, and as many as before after it: the order of a sum can depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_determinism() -> dict[str, object]:
    """Python, packages, hardware, environment variables (None where unset) and, where torch is loaded, its threads and switches."""
    described: dict[str, object] = {
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "processor": _processor(),
        "gpus": [asdict(gpu) for gpu in gpus()],
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "hash_randomisation": bool(sys.flags.hash_randomization),
    }
    torch = sys.modules.get("torch")
    return described | ({"torch": _switches(torch)} if torch is not None else {})


def _switches(torch) -> dict[str, object]:
    """Of a loaded torch: what decides in which order it adds up, and by which kernels."""
    found = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if torch.cuda.is_available():
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "flash_attention": torch.backends.cuda.flash_sdp_enabled(),
            "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
            "fp16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        }
    return found


def _processor() -> str:
    """The processor's name where the system tells it: another one may take other vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
