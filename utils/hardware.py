"""The machine under the run: Kaggle, Colab or local; GPU, memory, disk, packages. Nothing heavy is imported here."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import HardwareError, RunDirError, first_line
from utils.project import KAGGLE, cache_dir

if TYPE_CHECKING:
    from utils.schema import HardwareSection  # pydantic: not before it is installed

GIB = 1024**3
# These change numbers or break cells when they move.
STACK = ("transformers", "trl", "peft", "datasets", "accelerate")
CUDA_STACK = ("bitsandbytes", "unsloth", "unsloth_zoo")
_CUDA_OF_DRIVER = {580: 13, 525: 12}  # the newest major version that a driver from this one on takes


@dataclass(frozen=True)
class Gpu:
    """One CUDA GPU as nvidia-smi tells it; memory in GiB."""

    name: str
    memory_gib: float
    capability: str


def where() -> str:
    """`kaggle`, `colab` or `local`."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") or (KAGGLE / "working").is_dir():
        return "kaggle"
    if importlib.util.find_spec("google") and importlib.util.find_spec("google.colab"):
        return "colab"
    return "local"


@cache
def gpus() -> tuple[Gpu, ...]:
    """The CUDA GPUs that this process may use, honouring CUDA_VISIBLE_DEVICES; empty without a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return ()
    found = []
    for line in _ask_driver("name,memory.total,compute_cap"):
        name, memory, capability = (part.strip() for part in line.rsplit(",", 2))
        gib = round(float(memory) / 1024, 1) if memory.isdigit() else 0.0  # "[N/A]" on some cards
        found.append(Gpu(name, gib, capability))
    if visible and all(part.strip().isdigit() for part in visible.split(",")):
        found = [found[int(part)] for part in visible.split(",") if int(part) < len(found)]
    return tuple(found)


def _ask_driver(fields: str) -> list[str]:
    """nvidia-smi's line for each GPU; none without a driver."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        return subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    return []


@cache
def gpu_ids() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process found; asked before it narrows itself to one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(len(gpus()))]
    return tuple(name.strip() for name in names[: len(gpus())])


def processes(hardware: "HardwareSection") -> int:
    """How many processes share the work: as configured, or one for each GPU."""
    if hardware.processes != "auto":
        return hardware.processes
    return max(1, len(gpu_ids())) if resolve_hardware(hardware)["device"] == "cuda" else 1


def local_rank() -> int:
    """Which of this machine's training processes this is, as `accelerate launch` numbers them."""
    return int(os.environ.get("LOCAL_RANK", 0))


def global_rank() -> int:
    """Which of all machines' training processes this is."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def default_profile() -> str:
    """t4 where there is a CUDA GPU, demo elsewhere."""
    return "t4" if gpus() else "demo"


def resolve_hardware(hardware: "HardwareSection") -> dict[str, str]:
    """What `auto` comes to on this machine: device, backend, dtype, as plain words."""
    device, backend, dtype = hardware.device, hardware.backend, hardware.dtype
    if device == "auto":
        device = "cuda" if gpus() else "cpu"
    if backend == "auto":
        backend = "unsloth" if device == "cuda" and importlib.util.find_spec("unsloth") else "transformers"
    if dtype == "auto" and device == "cpu":
        dtype = "bfloat16" if cpu_multiplies_bfloat16() else "float32"
    elif dtype == "auto":  # a T4 has 7.5, and no bfloat16
        modern = bool(gpus()) and float(gpus()[0].capability or 0) >= 8.0 and not hardware.emulate_t4
        dtype = "bfloat16" if modern else "float16"
    return {"device": device, "backend": backend, "dtype": dtype}


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 (AVX-512 or AMX): twice as fast as float32, else far slower."""
    with contextlib.suppress(OSError):  # macOS has no such file
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def hub_cache() -> Path:
    """huggingface_hub's folder, for downloads and the token."""
    return Path(os.environ.get("HF_HOME") or cache_dir().with_name("huggingface"))


def free_disk_gib(path: Path) -> float:
    """Free space in GiB on the file system that will hold `path`; raises RunDirError where it may not be looked at."""
    try:
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free / GIB
    except OSError as error:
        raise RunDirError(f"{path} cannot be used ({error.strerror}); choose another path.") from None


def require_disk(path: Path, needed_gib: float, purpose: str) -> None:
    """Raise HardwareError with both numbers where less than `needed_gib` is free for `purpose`."""
    free = free_disk_gib(path)
    if free < needed_gib:
        found = f"at {path}; found {free:.1f} GiB. Free some space or choose another --run-dir."
        raise HardwareError(f"{purpose} needs {needed_gib:.1f} GiB of free disk {found}")


def require_gpu(profile: str, needed_gib: float) -> Gpu:
    """The first GPU; raises HardwareError where there is none or it has less than `needed_gib` of memory."""
    found = gpus()
    if not found:
        instead = "switch the accelerator to a T4, or take the profile demo, which needs no GPU."
        raise HardwareError(f"The profile {profile} needs a CUDA GPU and found none; {instead}")
    if found[0].memory_gib < needed_gib:
        there = f"found {found[0].memory_gib:.1f} GiB on {found[0].name}. Take a larger GPU, or the profile demo."
        raise HardwareError(f"The profile {profile} needs {needed_gib:.1f} GiB of GPU memory; {there}")
    return found[0]


def check_cuda(hardware: "HardwareSection") -> str:
    """Compute a little on every GPU where the run expects one; where that works, in words.

    Raises HardwareError with torch's reason (a build without CUDA, for a newer driver, or without this GPU's kernels),
    and with the builds that this driver takes.
    """
    if resolve_hardware(hardware)["device"] != "cuda":
        return "no GPU is asked for"
    import torch

    build = f"torch {torch.__version__}"
    try:
        for number in range(max(1, torch.cuda.device_count())):
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            (ones @ ones).sum().item()
    except (RuntimeError, AssertionError) as error:
        driver = (_ask_driver("driver_version") or ["0"])[0].strip()
        takes = next((cuda for since, cuda in _CUDA_OF_DRIVER.items() if int(driver.split(".")[0]) >= since), 11)
        found = f"{build}, built for CUDA {torch.version.cuda}, cannot compute on this GPU ({first_line(error)})"
        instead = f"the driver {driver} takes builds for CUDA {takes}: choose one at pytorch.org/get-started"
        raise HardwareError(f"{found}; {instead}, or update it.") from None
    return f"{build} computes on {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def peak_memory() -> dict[str, float]:
    """Peak of this process so far, in GiB: `rss_gib`, and `gpu_reserved_gib` where torch runs on CUDA."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / GIB, 2)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        reserved = max(torch.cuda.max_memory_reserved(i) for i in range(torch.cuda.device_count()))
        peak["gpu_reserved_gib"] = round(reserved / GIB, 2)
    return peak


def installed(package: str) -> str | None:
    """The installed version, or None."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def describe() -> dict[str, object]:
    """This machine, for environment.json: platform, Python, processor, memory, GPUs."""
    return {
        "where": where(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": [asdict(gpu) for gpu in gpus()],
    }


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch inside: the order of a sum can depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_determinism() -> dict[str, object]:
    """What can move a figure by a rounding: Python, packages, processor, GPUs, environment and, where it is loaded, torch."""
    processor = platform.processor()
    with contextlib.suppress(OSError, TypeError):  # another one may take other vector instructions
        processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))[1]
    described = describe() | {
        "packages": {name: installed(name) for name in ("tokenizers", "numpy", "scipy", "scikit-learn")},
        "processor": processor,
        "environment": {name: os.environ.get(name) for name in ("PYTHONHASHSEED", "OMP_NUM_THREADS")},
    }
    if torch := sys.modules.get("torch"):
        described["torch"] = {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        }
    return described
