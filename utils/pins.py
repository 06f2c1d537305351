"""On Kaggle and Colab: install what the pins ask for and the image lacks, around the image's own torch.

Nothing that is installed here is imported by this module or by those that it imports.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from utils.errors import PinError
from utils.hardware import gpus, installed, left_to_the_platform, read_pins, where

TORCH_FAMILY = ("torch", "torchvision", "torchaudio", "triton")


def install_missing(restart: bool = True) -> None:
    """On Kaggle and Colab, install what the pins ask for and the image lacks; elsewhere do nothing.

    The platform's torch family is held still by a constraints file. Raises PinError with pip's last line where the
    installation fails and, with `restart`, where this kernel had already loaded what was replaced.
    """
    if where() == "local":
        return
    _warn_without_gpu()
    left_out = left_to_the_platform()
    missing = [
        str(requirement)
        for name, requirement in read_pins().items()
        if name not in left_out and not requirement.specifier.contains(installed(name) or "0", prereleases=True)
    ]
    if missing:
        before = _loaded()
        with tempfile.TemporaryDirectory() as scratch:
            constraints = Path(scratch) / "constraints.txt"
            constraints.write_text("\n".join(held_still()) + "\n")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *missing]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
            raise PinError(f"pip could not install {', '.join(missing)}: {last} Check that the internet is on.")
        print(f"installed {', '.join(missing)}")
    _drop_old_torchao()
    if missing and restart:
        _require_restart(before)


def held_still() -> list[str]:
    """Constraints for pip: the image's torch family as it is, and no torchao that this torch cannot load."""
    held = [f"{name}=={installed(name)}" for name in TORCH_FAMILY if installed(name)]
    torch = installed("torch")
    if torch and _numbers(torch) < (2, 11):
        held.append("torchao<0.18")  # 0.18 is built for torch 2.11 and newer
    return held


def _loaded() -> dict[str, str | None]:
    """{package: version} of what this process has imported so far."""
    top = {name.partition(".")[0] for name in sys.modules}
    packages = {
        name for module, names in importlib.metadata.packages_distributions().items() if module in top for name in names
    }
    return {name: installed(name) for name in packages}


def _require_restart(before: dict[str, str | None]) -> None:
    """Raise PinError where a package that this kernel had imported is another one now: half of it would be the old one."""
    changed = sorted(name for name, version in before.items() if installed(name) != version)
    if changed:
        menu = "Runtime > Restart session" if where() == "colab" else "Run > Restart & clear cell outputs"
        raise PinError(
            f"The pinned {', '.join(changed)} are installed, but this kernel had loaded other versions; "
            f"restart it ({menu}) and run all cells again: the second time nothing is installed."
        )


def _warn_without_gpu() -> None:
    if not gpus():
        menu = "Runtime > Change runtime type > T4 GPU" if where() == "colab" else "Settings > Accelerator > GPU T4 x2"
        print(f'This runtime has no GPU: only PROFILE = "demo" runs here. For the real model choose {menu}.')


def _drop_old_torchao() -> None:
    """peft refuses torchao below 0.16, which Kaggle and Colab ship (unslothai/notebooks issues 258 and 262)."""
    version = installed("torchao")
    if version and _numbers(version) < (0, 16):
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "-y", "torchao"], check=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
