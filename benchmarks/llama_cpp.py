"""A llama.cpp for this machine, built from the source that llama-cpp-python ships, where no ready build can be had.

    python -m benchmarks.llama_cpp            # into ~/.unsloth/llama.cpp, where 05 looks for it; 10 to 40 minutes

It needs cmake, a C++ compiler and a package index, and no other network.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from utils.errors import HardwareError
from utils.export.gguf import HOME
from utils.processes import Child

SOURCE = "llama-cpp-python==0.3.36"  # its source distribution carries llama.cpp, converter and all


def build_llama_cpp(folder: Path) -> Path:
    """Download the pinned source by pip and build it with cmake; where that fails, nothing is left at `folder`."""
    if folder.exists():
        raise HardwareError(f"{folder} is there already, without what is needed of llama.cpp; delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", SOURCE]
        _call([*pip, "--dest", scratch])
        (archive,) = Path(scratch).glob("llama_cpp_python-*.tar.gz")
        # The program, not Python's module, which refuses what would leave the folder from 3.11.4 on only.
        _call(["tar", "-xzf", archive, "-C", scratch])
        (tree,) = Path(scratch).glob("llama_cpp_python-*/vendor/llama.cpp")
        # Makefiles, not ninja: the archive's dates lie in the future of some machines, and ninja never gets done then.
        # Static, and without what asks a network for parts: the tree can be moved and the build needs nothing more.
        switches = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "USE_PREBUILT_UI")
        options = [f"-DLLAMA_{name}=OFF" for name in switches] + ["-DBUILD_SHARED_LIBS=OFF"]
        made = ["-S", tree, "-B", tree / "build", "-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=Release", *options]
        _call(["cmake", *made])
        targets = [f"llama-{name}" for name in ("quantize", "completion", "server")]
        _call(["cmake", "--build", tree / "build", "--parallel", str(os.cpu_count() or 1), "--target", *targets])
        shutil.move(tree, folder)
    return folder


def _call(words: Sequence[str | Path]) -> None:
    """Run a program; raises HardwareError with its last line where it fails or is not installed."""
    print("+", *words, flush=True)
    if shutil.which(words[0]) is None:
        raise HardwareError(f"{words[0]} is not installed, which llama.cpp is built with; take another machine.")
    with tempfile.TemporaryDirectory() as scratch:
        printed = Path(scratch) / "stdout"  # apart: cmake's last line there says nothing of the reason
        with Child(["sh", "-c", 'exec "$@" > "$0"', printed, *words], Path(scratch) / "stderr") as child:
            if child.wait() == 0:
                return
        child.log = child.log if child.log.stat().st_size else printed
        raise HardwareError(f"llama.cpp was not built: {Path(words[0]).name} failed ({child.last_words()}).")


def main(folder: Annotated[Path, typer.Argument(help="Where to; nothing may be there.")] = HOME) -> None:
    """Build llama.cpp with its converter, quantiser and server."""
    typer.echo(f"{build_llama_cpp(folder)} is built; elsewhere than by default, name it in LLAMA_CPP_DIR")


if __name__ == "__main__":
    typer.run(main)
