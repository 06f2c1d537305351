"""llama.cpp: where it is, how to get it, and its server for asking a GGUF file what it answers.

python -m utils.export.llama_cpp FOLDER      # builds it there, from the source that llama-cpp-python ships; 10 to 40 minutes
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from utils.errors import HardwareError, ModelError
from utils.project import command

SOURCE = "llama-cpp-python==0.3.36"  # its source distribution carries llama.cpp, converter and all
_TARGETS = ("llama-quantize", "llama-completion", "llama-tokenize", "llama-server")
_CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
_START_S = 600  # a 16 GB file from a slow disk


@dataclass(frozen=True)
class LlamaCpp:
    """A llama.cpp tree: converters in `root`, programs beside them or in build/bin."""

    root: Path

    def program(self, name: str) -> Path | None:
        """The built program called `name`; None where it was not built."""
        places = (self.root / name, self.root / "build" / "bin" / name)
        return next((path for path in places if os.access(path, os.X_OK) and path.is_file()), None)


def find_llama_cpp() -> LlamaCpp | None:
    """The tree in LLAMA_CPP_DIR, or the one that unsloth keeps; None where neither has converters and quantiser.

    Raises HardwareError where LLAMA_CPP_DIR is set and names no such tree.
    """
    named = os.environ.get("LLAMA_CPP_DIR")
    kept = os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or Path.home() / ".unsloth" / "llama.cpp"
    tree = LlamaCpp(Path(named or kept).expanduser().resolve())
    if all((tree.root / name).exists() for name in _CONVERTERS) and tree.program("llama-quantize"):
        return tree
    if named:
        raise HardwareError(
            f"LLAMA_CPP_DIR is {named}, which lacks {', '.join(_CONVERTERS)} or a built llama-quantize; unset it, or run "
            f"python -m utils.export.llama_cpp FOLDER and set it to that."
        )
    return None


def how_to_get_it(run_dir: Path) -> str:
    """The exact command that makes GGUF files where llama.cpp was not found."""
    return (
        "No llama.cpp was found, so no GGUF file is written; the other exports stand. This makes them, once it has fetched "
        "llama.cpp or built it, which takes 10 to 40 minutes, cmake and a C++ compiler:\n"
        f"  {command()} run --run-dir {run_dir} --set export.install_llama_cpp=true\n"
        "With a built tree of your own, put LLAMA_CPP_DIR=FOLDER before it."
    )


def install_llama_cpp() -> LlamaCpp:
    """Fetch unsloth's build where unsloth is installed and there is a network, else build from source; return the tree."""
    fetch = "from unsloth_zoo.llama_cpp import install_llama_cpp; install_llama_cpp()"
    environment = {**os.environ, "UNSLOTH_DISABLE_STATISTICS": "1"}
    answer = subprocess.run([sys.executable, "-c", fetch], env=environment, capture_output=True, text=True, check=False)
    found = find_llama_cpp() if answer.returncode == 0 else None
    return found or build_llama_cpp(Path.home() / ".unsloth" / "llama.cpp")


def build_llama_cpp(folder: Path) -> LlamaCpp:
    """Download the pinned source by pip, build its programs with cmake, and put the tree at `folder`.

    Raises HardwareError with the failing tool's last line; nothing is left at `folder` then.
    """
    if folder.exists():
        raise HardwareError(f"{folder} is there already; name another folder, or delete it.")
    if not hasattr(tarfile, "data_filter"):  # it came with 3.11.4
        found = platform.python_version()
        raise HardwareError(
            f"Python {found} cannot unpack an archive safely, which 3.11.4 and newer can; take one of those."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", SOURCE]
        _run([*pip, "--dest", scratch])
        (archive,) = Path(scratch).glob("llama_cpp_python-*.tar.gz")
        try:
            with tarfile.open(archive) as packed:
                packed.extractall(scratch, filter="data")  # refuses what would leave the folder
        except tarfile.TarError as error:
            raise HardwareError(
                f"{archive.name} is not unpacked: {error}; fetch it again, from another index."
            ) from None
        (tree,) = Path(scratch).glob("llama_cpp_python-*/vendor/llama.cpp")
        # Makefiles, not ninja: the archive's dates lie in the future of some machines, and ninja never gets done then.
        # Static, and without what asks a network for parts: the tree can be moved and the build needs nothing more.
        switches = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "USE_PREBUILT_UI")
        options = [f"-DLLAMA_{name}=OFF" for name in switches] + ["-DBUILD_SHARED_LIBS=OFF"]
        build = str(tree / "build")
        _run(["cmake", "-S", str(tree), "-B", build, "-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=Release", *options])
        _run(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1), "--target", *_TARGETS])
        shutil.move(tree, folder)
    return LlamaCpp(folder)


def _run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise HardwareError(f"{command[0]} is not installed; llama.cpp is built with it.") from None
    if answer.returncode:
        last = ((answer.stderr or answer.stdout).strip().splitlines() or ["no message"])[-1]
        raise HardwareError(f"llama.cpp could not be built, {command[0]} said: {last[:300]}")


class LlamaServer:
    """`llama-server` on a file, on this machine only; a context manager."""

    def __init__(self, tree: LlamaCpp, model: Path, lora: Path | None = None, context: int = 4096):
        program = tree.program("llama-server")
        if program is None:
            raise HardwareError(f"{tree.root} has no llama-server; build that target too.")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["-c", str(context), "-np", "1", *(["--lora", str(lora)] if lora else [])]

    def __enter__(self) -> LlamaServer:
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(self.command, stdout=self._log, stderr=subprocess.STDOUT)
        started = time.monotonic()
        while time.monotonic() - started < _START_S:
            if self._process.poll() is not None:
                self._log.seek(0)
                last = (self._log.read().strip().splitlines() or ["no message"])[-1][:300]
                self.__exit__()
                raise ModelError(f"llama.cpp could not load {self.command[2]}: {last}")
            try:
                self._get("/health")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        self.__exit__()
        raise ModelError(f"llama.cpp did not load {self.command[2]} within {_START_S} s.")

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, BOS included, special tokens read as such."""
        return self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def continue_greedily(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Up to `new_tokens` greedy token ids after `ids`."""
        wanted = {"prompt": list(ids), "n_predict": new_tokens, "temperature": 0, "return_tokens": True}
        return self._post("/completion", wanted | {"cache_prompt": False})["tokens"]

    def _post(self, path: str, body: dict) -> dict:
        return self._get(path, json.dumps(body).encode())

    def _get(self, path: str, data: bytes | None = None) -> dict:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business here
        with opener.open(request, timeout=_START_S) as answer:
            return json.load(answer)


def _main(folder: Annotated[Path, typer.Argument(help="Where it goes; made anew.")]) -> None:
    """Build llama.cpp's converter, quantiser and command line: 10 to 40 minutes, with cmake and a C++ compiler."""
    try:
        print(f"built; now: export LLAMA_CPP_DIR={build_llama_cpp(folder.expanduser().resolve()).root}")
    except HardwareError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    typer.run(_main)
