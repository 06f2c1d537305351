"""On Kaggle and Colab: install what the pins ask for and the image lacks; nothing of that is imported here."""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from utils.errors import HardwareError
from utils.hardware import gpus, installed, left_to_the_platform, read_pins, where

# The image's torch, and what its running kernel talks through: neither may move under it, whoever asks for another.
IMAGES_OWN = ("torch", "torchvision", "torchaudio", "triton", "jupyter-core", "tornado", "pyzmq")


def install_missing(restart: bool = True) -> None:
    """On Kaggle and Colab, install what the pins ask for and the image lacks.

    Raises HardwareError where that fails, and with `restart` where this kernel had loaded what was replaced.
    """
    if where() == "local":
        return
    if not gpus():
        menu = "Runtime > Change runtime type > T4 GPU" if where() == "colab" else "Settings > Accelerator > GPU T4 x2"
        print(f'This runtime has no GPU: only PROFILE = "demo" runs here. For the real model choose {menu}.')
    missing = [str(requirement) for requirement in read_pins().values() if not _kept(requirement)]
    if missing:
        before = _loaded()
        with tempfile.TemporaryDirectory() as scratch:
            constraints = Path(scratch) / "constraints.txt"
            constraints.write_text("\n".join(held_still()) + "\n")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *missing]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
            raise HardwareError(f"pip could not install {', '.join(missing)}: {last} Check that the internet is on.")
        print(f"installed {', '.join(missing)}")
    version = installed("torchao")
    if version and Version(version) < Version("0.16"):  # peft refuses it (unslothai/notebooks issues 258 and 262)
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "-y", "torchao"], check=True)
    if missing and restart:
        _require_restart(before)


def held_still() -> list[str]:
    """Constraints for pip: what stays as the image has it, so that nothing newly installed moves it."""
    kept = [name for name, requirement in read_pins().items() if name not in IMAGES_OWN and _kept(requirement)]
    return [f"{name}=={version}" for name in (*IMAGES_OWN, *kept) if (version := installed(name))]


def _kept(requirement: Requirement) -> bool:
    """Whether the image's version, or its lack of one, is all right here."""
    version = installed(requirement.name)
    allowed = version is not None and requirement.specifier.contains(version, prereleases=True)
    return allowed or canonicalize_name(requirement.name) in left_to_the_platform()


def _loaded() -> dict[str, str | None]:
    """{package: version} of what this process has imported so far."""
    top = {name.partition(".")[0] for name in sys.modules}
    packages = {
        name for module, names in importlib.metadata.packages_distributions().items() if module in top for name in names
    }
    return {name: installed(name) for name in packages}


def _require_restart(before: dict[str, str | None]) -> None:
    """Raise HardwareError where a package that this kernel had imported is another one now."""
    changed = sorted(name for name, version in before.items() if installed(name) != version)
    if changed:
        menu = "Runtime > Restart session" if where() == "colab" else "Run > Restart & clear cell outputs"
        found = f"The pinned {', '.join(changed)} are installed, but this kernel had loaded other versions"
        raise HardwareError(f"{found}; restart it ({menu}) and run all cells again.")
