"""`python -m tests.colab_image LIST OUT`, for `make colab`: what the demo needs, in the versions of Colab's image.

LIST is the image's `pip freeze`. Its version of a package is taken wherever requirements.txt allows it, else the lock's;
torch is the lock's CPU build. Asks an index, through uv.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tests.drift import compiled, frozen
from utils.files import write_text
from utils.project import ROOT


def chosen_versions(image: dict[str, str], python: Path) -> dict[str, str]:
    """{package: version} of an environment of `python`'s for the series, without the tests' own tools and without CUDA."""
    wanted = (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8").partition("# tests")[0]
    pins = f"-c {ROOT / 'requirements.txt'}"
    preferred = frozen((ROOT / "requirements-cpu.lock").read_text(encoding="utf-8"))
    preferred |= {name: version for name, version in image.items() if name in preferred and name != "torch"}
    found = compiled(wanted.replace("-c requirements.txt", pins), "--python", str(python), preferred=preferred)
    return {name: version for name, version in found.items() if not name.startswith(("nvidia-", "cuda-", "triton"))}


def main(image: Path, out: Path, python: Annotated[Path, typer.Option(help="The environment's.")]) -> None:
    versions = chosen_versions(has := frozen(image.read_text()), python)
    write_text(out, "".join(f"{name}=={version}\n" for name, version in sorted(versions.items())))
    same = sum(has.get(name) == version for name, version in versions.items())
    print(f"{len(versions)} packages, {same} of them as on {image.name}, {len(versions.keys() - has.keys())} not there")


if __name__ == "__main__":
    typer.run(main)
