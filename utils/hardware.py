"""The machine under the run: Kaggle, Colab or local; GPU, memory, disk; installed packages against the pins.

Nothing heavy is imported here: the GPU is asked through nvidia-smi, so a process that only checks stays light.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils.errors import HardwareError, PinError, RunDirError
from utils.project import KAGGLE, ROOT

if TYPE_CHECKING:
    from utils.schema import HardwareSection  # pydantic: not before it is installed

GIB = 1024**3
# Which of the pins a run rests on: these change numbers or break cells when they move.
STACK = ("transformers", "trl", "peft", "datasets", "accelerate")
CUDA_STACK = ("bitsandbytes", "unsloth", "unsloth_zoo")


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
    command = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if command is None or visible in ("", "-1"):
        return ()
    query = [command, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.SubprocessError, OSError):
        return ()
    found = []
    for line in answer.stdout.splitlines():
        name, memory, capability = (part.strip() for part in line.rsplit(",", 2))
        gib = round(float(memory) / 1024, 1) if memory.isdigit() else 0.0  # "[N/A]" on some virtual cards
        found.append(Gpu(name, gib, capability))
    if visible and all(part.strip().isdigit() for part in visible.split(",")):
        return tuple(found[int(part)] for part in visible.split(",") if int(part) < len(found))
    return tuple(found)


@cache
def gpu_ids() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process found; asked before it narrows itself to one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(len(gpus()))]
    return tuple(name.strip() for name in names[: len(gpus())])


def processes(hardware: HardwareSection) -> int:
    """How many processes share the work: as configured, or one for each GPU."""
    if hardware.processes != "auto":
        return hardware.processes
    return max(1, len(gpu_ids())) if resolve_hardware(hardware)["device"] == "cuda" else 1


def local_rank() -> int:
    """Which of this machine's training processes this is, as `accelerate launch` numbers them; 0 where there is one."""
    return int(os.environ.get("LOCAL_RANK", 0))


def global_rank() -> int:
    """Which of all machines' training processes this is; the first one writes what is left."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def default_profile() -> str:
    """t4 where there is a CUDA GPU, demo elsewhere."""
    return "t4" if gpus() else "demo"


def resolve_hardware(hardware: HardwareSection) -> dict[str, str]:
    """What `auto` comes to on this machine: device, backend, dtype, as plain words.

    unsloth where it is installed and a CUDA GPU is there; bfloat16 from compute capability 8.0 on (a T4 has 7.5).
    """
    device, backend, dtype = hardware.device, hardware.backend, hardware.dtype
    if device == "auto":
        device = "cuda" if gpus() else "cpu"
    if backend == "auto":
        backend = "unsloth" if device == "cuda" and importlib.util.find_spec("unsloth") else "transformers"
    if dtype == "auto":
        modern = bool(gpus()) and float(gpus()[0].capability or 0) >= 8.0
        dtype = "float32" if device == "cpu" else "bfloat16" if modern else "float16"
    return {"device": device, "backend": backend, "dtype": dtype}


def memory_gib() -> float:
    """This machine's main memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def hub_cache() -> Path:
    """The folder that huggingface_hub downloads into."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def free_disk_gib(path: Path) -> float:
    """Free space in GiB on the file system that will hold `path`; raises RunDirError for a name that none can hold."""
    try:
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free / GIB
    except (OSError, ValueError) as error:
        raise RunDirError(
            f"{path} cannot be used ({getattr(error, 'strerror', None) or error}); choose another path."
        ) from None


def require_disk(path: Path, needed_gib: float, purpose: str) -> None:
    """Raise HardwareError with both numbers where less than `needed_gib` is free for `purpose`."""
    free = free_disk_gib(path)
    if free < needed_gib:
        raise HardwareError(
            f"{purpose} needs {needed_gib:.1f} GiB of free disk at {path}; found {free:.1f} GiB. "
            "Free some space or choose another --run-dir."
        )


def require_gpu(profile: str, needed_gib: float) -> Gpu:
    """The first GPU; raises HardwareError where there is none or it has less than `needed_gib` of memory."""
    found = gpus()
    if not found:
        raise HardwareError(
            f"The profile {profile} needs a CUDA GPU and found none; switch the accelerator to a T4, "
            "or take the profile demo, which needs no GPU."
        )
    if found[0].memory_gib < needed_gib:
        raise HardwareError(
            f"The profile {profile} needs {needed_gib:.1f} GiB of GPU memory; found {found[0].memory_gib:.1f} GiB "
            f"on {found[0].name}. Take a larger GPU, or the profile demo."
        )
    return found[0]


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
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_pins(path: Path | None = None) -> dict[str, Requirement]:
    """requirements.txt as {normalised name: Requirement}; raises PinError where the file is missing."""
    path = path or ROOT / "requirements.txt"
    if not path.exists():
        raise PinError(f"{path} is missing; take it back from git, the versions are checked against it.")
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line and not line.startswith("-"):
            requirement = Requirement(line)
            pins[canonicalize_name(requirement.name)] = requirement
    return pins


def check_pins(cuda: bool, enforce: bool = True) -> list[dict[str, str | bool | None]]:
    """Compare every pin with what is installed: rows of package, pinned, found, holds.

    Raises PinError for the first package that is installed in another version, or that a run needs and is missing.
    A package that this machine does without (unsloth without a CUDA GPU, say) is reported and not enforced.
    """
    pins = read_pins()
    rows = []
    for name, requirement in pins.items():
        found = installed(name)
        holds = found is not None and requirement.specifier.contains(found, prereleases=True)
        rows.append({"package": name, "pinned": str(requirement.specifier), "found": found, "holds": holds})
    needed = {canonicalize_name(name) for name in ("torch", *STACK, *(CUDA_STACK if cuda else ()))}
    for row in rows:
        row["needed here"] = row["package"] in needed
    for row in rows if enforce else ():
        installed_otherwise = row["found"] is not None and row["package"] not in left_to_the_platform()
        if not row["holds"] and (installed_otherwise or row["needed here"]):
            raise PinError(
                f"{row['package']} is {row['found'] or 'not installed'}, but requirements.txt asks for "
                f"{row['package']}{row['pinned']}; run `pip install -r requirements.txt` and restart the kernel."
            )
    return rows


def quiet_libraries() -> None:
    """Silence what libraries say in a notebook that a reader can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each fork warns
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm without widgets draws text, which is fine


def left_to_the_platform() -> set[str]:
    """Packages whose version is not ours to choose here.

    A kernel cannot replace the ipykernel that it runs on, without a GPU nothing can use the CUDA stack, and nobody
    pushes to Kaggle from Kaggle.
    """
    without_gpu = set() if gpus() else {canonicalize_name(name) for name in (*CUDA_STACK, "torchao")}
    return {"ipykernel"} | without_gpu | (set() if where() == "local" else {"kaggle"})


def describe() -> dict[str, object]:
    """This machine, for environment.json: platform, Python, processor, memory, GPUs."""
    return {
        "where": where(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory_gib(), 1),
        "gpus": [asdict(gpu) for gpu in gpus()],
    }


_PACKAGES = "tokenizers safetensors numpy pandas pyarrow scipy scikit-learn sparse_dot_topn statsmodels"
_ENVIRONMENT = (
    "PYTHONHASHSEED OMP_NUM_THREADS MKL_NUM_THREADS GOMP_SPINCOUNT TOKENIZERS_PARALLELISM CUBLAS_WORKSPACE_CONFIG "
    "CUDA_VISIBLE_DEVICES NVIDIA_TF32_OVERRIDE"
)


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
        "packages": {name: installed(name) for name in _PACKAGES.split()},
        "machine": platform.machine(),
        "processor": _processor(),
        "gpus": [asdict(gpu) for gpu in gpus()],
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT.split()},
        "hash_randomisation": bool(sys.flags.hash_randomization),
    }
    torch = sys.modules.get("torch")
    return described | ({"torch": _switches(torch)} if torch is not None else {})


def _switches(torch) -> dict[str, object]:
    """Of a loaded torch: what decides in which order it adds up, and by which kernels."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
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
            "cudnn": cudnn.version(),
            "cudnn_benchmark": cudnn.benchmark,
            "cudnn_deterministic": cudnn.deterministic,
            "flash_attention": cuda.flash_sdp_enabled(),
            "cudnn_attention": cuda.cudnn_sdp_enabled(),
            "fp16_reduced_precision_reduction": cuda.matmul.allow_fp16_reduced_precision_reduction,
        }
    return found


def _processor() -> str:
    """The processor's name where the system tells it: another one may take other vector instructions."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
