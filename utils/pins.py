"""requirements.txt against what is installed, and on Kaggle and Colab what their images lack; nothing of it is loaded here."""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from utils.errors import HardwareError, last_line
from utils.hardware import CUDA_STACK, STACK, gpus, installed, where
from utils.project import ROOT

# The image's torch, and what its running kernel talks through: neither may move under it, whoever asks for another.
IMAGES_OWN = ("torch", "torchvision", "torchaudio", "triton", "jupyter-core", "tornado", "pyzmq")


def read_pins(path: Path = ROOT / "requirements.txt") -> dict[str, Requirement]:
    """requirements.txt as {normalised name: Requirement}; raises HardwareError where the file is missing."""
    if not path.exists():
        raise HardwareError(f"{path} is missing; take it back from git, the versions are checked against it.")
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def check_pins(cuda: bool, enforce: bool = True) -> list[dict[str, str | bool | None]]:
    """Compare every pin with what is installed: rows of package, pinned, found, holds, needed here.

    Raises HardwareError for the first that does not hold; what this machine does without is only reported.
    """
    needed = {canonicalize_name(name) for name in ("torch", *STACK, *(CUDA_STACK if cuda else ()))}
    rows = []
    for name, pin in read_pins().items():
        found = installed(name)
        holds = found is not None and pin.specifier.contains(found, prereleases=True)
        enforced = name in needed or (found is not None and name not in left_to_the_platform())
        if enforce and enforced and not holds:
            wanted = f"requirements.txt asks for {name}{pin.specifier}"
            again = "run `pip install -r requirements.txt` and restart the kernel."
            raise HardwareError(f"{name} is {found or 'not installed'}, but {wanted}; {again}")
        row = {"package": name, "pinned": str(pin.specifier), "found": found, "holds": holds}
        rows.append(row | {"needed here": name in needed})
    return rows


def left_to_the_platform() -> set[str]:
    """Packages whose version is not ours to choose here: the running kernel's, and what nothing here can use."""
    without_gpu = set() if gpus() else {canonicalize_name(name) for name in (*CUDA_STACK, "torchao")}
    return {"ipykernel"} | without_gpu | (set() if where() == "local" else {"kaggle"})


def install_missing(restart: bool = True) -> None:
    """On Kaggle and Colab, install what the pins ask for and the image lacks, and say first what that is.

    Raises HardwareError where that fails, and with `restart` where this kernel had loaded what is replaced.
    """
    if where() == "local":
        return
    if not gpus():
        menu = "Runtime > Change runtime type > T4 GPU" if where() == "colab" else "Settings > Accelerator > GPU T4 x2"
        print(f'This runtime has no GPU: only PROFILE = "demo" runs here. For the real model choose {menu}.')
    missing, stale = [requirement for requirement in read_pins().values() if not _kept(requirement)], []
    if missing:
        planned = _plan(missing)
        replaced = [name for name in planned if installed(name)]
        stale = sorted(_loaded() & set(replaced)) if restart else []
        of_which = f"{len(replaced)} of them in place of the image's"
        print(f"installing {len(planned)} packages, {of_which}: {', '.join(planned)}")
        if stale:
            print(f"this kernel has loaded {', '.join(stale)}: once they are installed, it has to be restarted")
        _pip("install", "--no-deps", *(f"{name}=={version}" for name, version in planned.items()))
    version = installed("torchao")
    if version and Version(version) < Version("0.16"):  # peft refuses it (unslothai/notebooks issues 258 and 262)
        _pip("uninstall", "-y", "torchao")
    if stale:
        menu = "Runtime > Restart session" if where() == "colab" else "Run > Restart & clear cell outputs"
        found = f"The pinned {', '.join(stale)} are installed, but this kernel had loaded other versions"
        raise HardwareError(f"{found}; restart it ({menu}) and run all cells again.")


def _plan(missing: list[Requirement]) -> dict[str, str]:
    """{package: version} of what pip would install for `missing`; what the image may keep stays as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "constraints.txt"
        constraints.write_text("\n".join(held_still()) + "\n")
        options = ("--dry-run", "--report", "-", "--constraint", str(constraints))
        report = json.loads(_pip("install", *options, *map(str, missing)))
    packages = (entry["metadata"] for entry in report["install"])
    return {canonicalize_name(package["name"]): package["version"] for package in packages}


def _pip(*words: str) -> str:
    """What pip prints; raises HardwareError with its last line where it fails."""
    command = [sys.executable, "-m", "pip", words[0], "--quiet", *words[1:]]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise HardwareError(f"pip {words[0]} failed: {last_line(answer.stderr)} Check that the internet is on.")
    return answer.stdout


def held_still() -> list[str]:
    """Constraints for pip: what stays as the image has it, so that nothing newly installed moves it."""
    kept = [name for name, requirement in read_pins().items() if name not in IMAGES_OWN and _kept(requirement)]
    return [f"{name}=={version}" for name in (*IMAGES_OWN, *kept) if (version := installed(name))]


def _kept(requirement: Requirement) -> bool:
    """Whether the image's version, or its lack of one, is all right here."""
    version = installed(requirement.name)
    allowed = version is not None and requirement.specifier.contains(version, prereleases=True)
    return allowed or canonicalize_name(requirement.name) in left_to_the_platform()


def _loaded() -> set[str]:
    """The packages that this process has imported so far."""
    top = {name.partition(".")[0] for name in sys.modules}
    owners = importlib.metadata.packages_distributions().items()
    return {canonicalize_name(name) for module, names in owners if module in top for name in names}
