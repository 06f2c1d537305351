"""What moved outside? `python -m tests.drift [LIST]`, the last line of `make drift`: asks an index, through uv.

Newer versions of what we name, and what our pins replace on Colab's image of LIST (its `pip freeze`), written to
benchmarks/results/colab-image.json. `make test` looks at that file alone; this is where the resolution itself is tried.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from packaging.utils import canonicalize_name
from rich import print as say

from utils.files import write_json
from utils.pins import read_pins
from utils.project import ROOT

TABLE = ROOT / "benchmarks" / "results" / "colab-image.json"
HELD = ("torch", "torchvision", "triton", "numpy")
MOST_REPLACED = 8
NEVER_REPLACED = set(
    "ipykernel ipython jupyter-client traitlets tornado pyzmq numpy pandas matplotlib requests psutil".split()
)
_FROZEN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s+;]+)", re.MULTILINE)  # "torch==2.11.0+cu128": an index has 2.11.0


def frozen(text: str) -> dict[str, str]:
    """{package: public version} of a lock or of what `pip freeze` says; packages from addresses are left out."""
    return {canonicalize_name(name): version for name, version in _FROZEN.findall(text)}


def compiled(
    wanted: str, *options: str, preferred: dict[str, str] | None = None, held: tuple[str, ...] = ()
) -> dict[str, str]:
    """The versions that uv chooses for `wanted`, those of `preferred` where they fit, those `held` whatever it takes."""
    preferred = preferred or {}
    with tempfile.TemporaryDirectory() as scratch:
        given, limits, out = (Path(scratch) / name for name in ("wanted.txt", "held.txt", "out.txt"))
        given.write_text(wanted)
        limits.write_text("".join(f"{name}=={preferred[name]}\n" for name in held))
        out.write_text("".join(f"{name}=={version}\n" for name, version in preferred.items()))
        command = [str(ROOT / ".venv-tools/bin/uv"), "pip", "compile", "--quiet", "--no-header", "--no-annotate", *options,
                   "--constraint", str(limits), "--output-file", str(out), str(given)]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return frozen(out.read_text())


def newer() -> dict[str, tuple[str, str]]:
    """{package: (locked or pinned, newest)} of what requirements.txt names, where they differ."""
    ours = {name: next(iter(pin.specifier)).version for name, pin in read_pins().items()}
    ours |= {
        name: version for name, version in frozen((ROOT / "requirements-cpu.lock").read_text()).items() if name in ours
    }
    newest = compiled("\n".join(ours), "--no-deps", "--python-version", "3.11")
    return {name: (ours[name], newest[name]) for name in ours if newest[name] != ours[name]}


def chosen(image: dict[str, str], requirements: str) -> dict[str, str]:
    """{package: version} that installing `requirements` on the image comes to, torch's CUDA libraries left out."""
    platform = ("--python-version", "3.13", "--python-platform", "x86_64-unknown-linux-gnu")
    ours = compiled(requirements, *platform, preferred=image, held=HELD)
    return {name: version for name, version in sorted(ours.items()) if not name.startswith(("nvidia-", "cuda-"))}


def replaced(image: dict[str, str], ours: dict[str, str]) -> dict[str, str]:
    """{package: "the image's version -> ours"} of what is another one then."""
    return {name: f"{image[name]} -> {ours[name]}" for name in ours if name in image and ours[name] != image[name]}


def main(
    image: Annotated[Path, typer.Argument(help="pip freeze of Colab's GPU image.")],
    before: Annotated[
        Path | None, typer.Option(help="An older requirements.txt, to be the table's first column.")
    ] = None,
) -> None:
    """Exit 1 where too much of the image, or what its kernel runs on, is replaced."""
    for name, (mine, newest) in newer().items():
        say(f"{name} {mine}: {newest} is there")
    if not image.exists():
        say(f"{image} is not here: what our pins replace on Colab's image was not looked at")
        return
    has = frozen(image.read_text())
    ours = chosen(has, (ROOT / "requirements.txt").read_text())
    table = {
        "image": image.name,
        "held": HELD,
        "before": replaced(has, chosen(has, before.read_text())) if before else json.loads(TABLE.read_text())["before"],
        "after": (now := replaced(has, ours)),
        "installed": {name: version for name, version in ours.items() if name not in has},
        "left": {"used": sum(has.get(name) == version for name, version in ours.items()), "all": len(has) - len(now)},
        "pins": {name: str(pin.specifier) for name, pin in read_pins().items()},
    }
    write_json(TABLE, table)
    say(f"{len(table['before'])} packages of {image.name} were replaced, now {len(now)}: {', '.join(now)}")
    raise typer.Exit(int(len(now) > MOST_REPLACED or bool(NEVER_REPLACED & set(now))))


if __name__ == "__main__":
    typer.run(main)
