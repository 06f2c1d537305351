"""GGUF files by llama.cpp's own converter and quantiser, and its server's answers held against the merged model's.

llama.cpp knows a pre-tokenizer by a hash over what it makes of a test text, and refuses a vocabulary that it has never
seen, the demo's among them. But what has to be named is only the rule that splits text before byte pairs are merged,
and tokenizer.json says which that is: where the converter's own table fails, the name follows from that rule, and the
server's token ids are compared with the tokenizer's before anything is believed.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import httpx

from utils.errors import HardwareError, ModelError, UserError
from utils.export.adapter import choose_place, keep_previous, new_folder, weights_gib
from utils.export.chat_template import make_modelfile
from utils.export.compare_logits import NEW_TOKENS, Continuations, compare_tokens
from utils.pipeline.run_dir import RunDir
from utils.processes import Child
from utils.project import ROOT, command, python_path
from utils.schema import GgufType

SOURCE = "llama-cpp-python==0.3.36"  # its source distribution carries llama.cpp, converter and all
LORA = "adapter-f32.gguf"  # the factors are small: kept as they are
# How far the best token may lie above the second, in logits, where another arithmetic still takes the second.
MARGINS = {"f16": 0.5, "q8_0": 1.0}
_HOME = Path.home() / ".unsloth" / "llama.cpp"
_TARGETS = ("llama-quantize", "llama-completion", "llama-tokenize", "llama-server")
_CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
_START_S = 600  # a 16 GB file from a slow disk
_NOT_BUILT = HardwareError, "llama.cpp was not built: take another machine, or set export.install_llama_cpp=false"
_NOT_CONVERTED = ModelError, "set export.gguf=[] to go without"
_LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"


@dataclass(frozen=True)
class LlamaCpp:
    """A llama.cpp tree: converters in `root`, programs beside them or in build/bin."""

    root: Path

    def program(self, name: str) -> Path | None:
        """The built program called `name`; None where it was not built."""
        places = (self.root / name, self.root / "build" / "bin" / name)
        return next((path for path in places if os.access(path, os.X_OK) and path.is_file()), None)


def find_llama_cpp() -> LlamaCpp | None:
    """The tree in LLAMA_CPP_DIR, or the one that unsloth keeps; None where neither has converters and quantiser."""
    named = os.environ.get("LLAMA_CPP_DIR")
    kept = os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or _HOME
    tree = LlamaCpp(Path(named or kept).expanduser().resolve())
    if all((tree.root / name).exists() for name in _CONVERTERS) and tree.program("llama-quantize"):
        return tree
    if named:
        raise HardwareError(
            f"LLAMA_CPP_DIR is {named}, which lacks {', '.join(_CONVERTERS)} or a built llama-quantize; unset it, and "
            "--set export.install_llama_cpp=true fetches or builds one."
        )
    return None


def install_llama_cpp() -> LlamaCpp:
    """Fetch unsloth's build where unsloth is installed and there is a network, else build from source."""
    fetch = "from unsloth_zoo.llama_cpp import install_llama_cpp; install_llama_cpp()"
    environment = {**os.environ, "UNSLOTH_DISABLE_STATISTICS": "1"}
    answer = subprocess.run([sys.executable, "-c", fetch], env=environment, capture_output=True, check=False)
    found = find_llama_cpp() if answer.returncode == 0 else None
    return found or build_llama_cpp(_HOME)


def build_llama_cpp(folder: Path) -> LlamaCpp:
    """Download the pinned source by pip and build it with cmake; where that fails, nothing is left at `folder`."""
    if folder.exists():
        raise HardwareError(f"{folder} is there already, without what is needed of llama.cpp; delete it.")
    if not hasattr(tarfile, "data_filter"):
        raise HardwareError("This Python cannot unpack an archive safely; take 3.11.4 or newer.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", SOURCE]
        _call([*pip, "--dest", scratch], *_NOT_BUILT)
        (archive,) = Path(scratch).glob("llama_cpp_python-*.tar.gz")
        try:
            with tarfile.open(archive) as packed:
                packed.extractall(scratch, filter="data")  # refuses what would leave the folder
        except tarfile.TarError as error:
            raise HardwareError(f"{archive.name} is not unpacked: {error}; fetch it from another index.") from None
        (tree,) = Path(scratch).glob("llama_cpp_python-*/vendor/llama.cpp")
        # Makefiles, not ninja: the archive's dates lie in the future of some machines, and ninja never gets done then.
        # Static, and without what asks a network for parts: the tree can be moved and the build needs nothing more.
        switches = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "USE_PREBUILT_UI")
        options = [f"-DLLAMA_{name}=OFF" for name in switches] + ["-DBUILD_SHARED_LIBS=OFF"]
        made = ["-S", tree, "-B", tree / "build", "-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=Release", *options]
        _call(["cmake", *made], *_NOT_BUILT)
        jobs = ["--parallel", str(os.cpu_count() or 1)]
        _call(["cmake", "--build", tree / "build", *jobs, "--target", *_TARGETS], *_NOT_BUILT)
        shutil.move(tree, folder)
    return LlamaCpp(folder)


def _call(words: Sequence[str | Path], kind: type[UserError], advice: str) -> None:
    """Run a program; raises `kind` with its last line where it fails or is not installed."""
    print("+", *words, flush=True)
    environment = {**os.environ, "PYTHONPATH": python_path()}
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=False)
    except FileNotFoundError:
        raise kind(f"{words[0]} is not installed, which llama.cpp is built with; {advice}.") from None
    if done.returncode:  # llama-quantize cuts strings in the middle of a character
        lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise kind(f"llama.cpp's {Path(words[0]).name} failed ({(lines or ['no message'])[-1][:300]}); {advice}.")


def file_name(kind: str) -> str:
    """model-q4_k_m.gguf and so on."""
    return f"model-{kind}.gguf"


def write_gguf(run: RunDir, folders: Mapping[str, Path]) -> Path | None:
    """export/gguf: the merged model and the LoRA for llama.cpp, and a Modelfile for Ollama; None without llama.cpp."""
    config, kinds, tree = run.config, run.config.export.gguf, None
    if "merged" in folders and kinds:
        tree = find_llama_cpp() or (install_llama_cpp() if config.export.install_llama_cpp else None)
        if tree is None:
            print(
                "No llama.cpp was found, so no GGUF file is written; the other exports stand. This fetches or builds it, in "
                f"10 to 40 minutes, and makes them:\n  {command()} run --run-dir {run.path} --set "
                "export.install_llama_cpp=true\nWith a built tree of your own, put LLAMA_CPP_DIR=FOLDER before it."
            )
    if tree is None:
        keep_previous(run, "gguf")
        return None
    half = weights_gib(folders["merged"])  # at most: a base in 32 bit takes twice as much
    size = half * (1 + 0.54 * ("q8_0" in kinds) + 0.32 * ("q4_k_m" in kinds))  # 8.5 and 4.9 of 16 bits, and a little
    target = choose_place(run, "gguf", size)
    with new_folder(target, size) as folder:
        convert(tree, folders["merged"], folders["adapter"], folder, kinds)
        smallest = file_name(max(kinds, key=get_args(GgufType).index))
        text = make_modelfile(smallest, config.prompt, config.generate, config.model.max_seq_length)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    return target


def convert(tree: LlamaCpp, merged: Path, adapter: Path, folder: Path, kinds: Sequence[str]) -> None:
    """Write the `kinds` (f16, q8_0, q4_k_m) of the merged model and the LoRA's GGUF; raises ModelError if it cannot be."""
    whole, known_as = folder / file_name("f16"), name_pre_tokenizer(merged / "tokenizer.json") or ""
    ours = [sys.executable, "-m", "utils.export.gguf", tree.root, known_as, merged]
    _call([*ours, "--outfile", whole, "--outtype", "f16"], *_NOT_CONVERTED)
    for kind in set(kinds) - {"f16"}:
        _call([tree.program("llama-quantize"), whole, folder / file_name(kind), kind.upper()], *_NOT_CONVERTED)
    lora = [sys.executable, tree.root / _CONVERTERS[1], "--base", merged, "--outtype", "f32"]
    _call([*lora, "--outfile", folder / LORA, adapter], *_NOT_CONVERTED)
    if "f16" not in kinds:
        whole.unlink()


def name_pre_tokenizer(tokenizer_json: Path) -> str | None:
    """llama.cpp's name for the splitting rule in a tokenizer.json: gpt-2, llama-bpe, or None for another rule."""
    rule = json.loads(tokenizer_json.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    parts = rule.get("pretokenizers", [rule])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        plain = parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space", False)
        return "gpt-2" if plain else None
    llama3 = kinds == ["Split", "ByteLevel"] and parts[0].get("pattern", {}).get("Regex") == _LLAMA3
    return "llama-bpe" if llama3 else None


def run_converter(root: str, known_as: str, arguments: list[str]) -> None:
    """Run llama.cpp's converter, with one more answer to which pre-tokenizer this is where it has a class to teach."""
    sys.path.insert(0, root)
    if known_as and (Path(root) / "conversion" / "base.py").is_file():
        from conversion.base import TextModel

        ask = TextModel.get_vocab_base_pre

        def name(self, tokenizer) -> str:
            try:
                return ask(self, tokenizer)
            except NotImplementedError:
                return known_as

        TextModel.get_vocab_base_pre = name
    sys.argv = [str(Path(root) / _CONVERTERS[0]), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


@contextmanager
def serve(tree: LlamaCpp, model: Path, lora: Path | None = None) -> Iterator[httpx.Client]:
    """A client of `llama-server` on a file, on this machine; raises ModelError where llama.cpp cannot load it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [tree.program("llama-server"), "-m", model, "--host", "127.0.0.1", "--port", port, "-c", "4096", "-np", "1"]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Child([*words, *(["--lora", lora] if lora else [])], Path(scratch) / "log") as child,
        # A proxy has no business here.
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_START_S, trust_env=False) as client,
    ):
        started = time.monotonic()
        while not _answers(client):
            if child.poll() is not None or time.monotonic() - started > _START_S:
                raise ModelError(f"llama.cpp could not load {model}: {child.last_words()}")
            time.sleep(0.1)
        yield client


def ask(client: httpx.Client, path: str, **wanted) -> list[int]:
    """The tokens of the server's answer."""
    return client.post(path, json=wanted).raise_for_status().json()["tokens"]


def continue_in_llama_cpp(client: httpx.Client, ids: Sequence[int]) -> list[int]:
    """Up to NEW_TOKENS greedy token ids after `ids`."""
    options = {"temperature": 0, "return_tokens": True, "cache_prompt": False}
    return ask(client, "/completion", prompt=list(ids), n_predict=NEW_TOKENS, **options)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


def check_gguf(
    tree: LlamaCpp, path: Path, tokenizer, prompts: Sequence[str], reference: Continuations, margin: float | None
) -> dict[str, float | int]:
    """Load a file in llama.cpp and compare token ids of prompts, and greedy continuations, with the reference.

    `margin`: where they part, the reference's best token may lie so far above its second; None: only reported. Raises
    ModelError where prompts are split otherwise, where the margin is exceeded, or where nothing is answered.
    """
    end, theirs, problem = tokenizer.eos_token_id, [], ""
    with serve(tree, path) as client:
        for prompt in prompts:
            ids = tokenizer(prompt).input_ids
            if ask(client, "/tokenize", content=prompt, add_special=True, parse_special=True) != ids:
                raise ModelError(f"{path.name} splits a prompt into other tokens than the tokenizer; run 05 again.")
            theirs.append([token for token in continue_in_llama_cpp(client, ids) if token != end])
    # llama.cpp leaves the end token out.
    ours = [[token for token in tokens if token != end] for tokens in reference.tokens[: len(prompts)]]
    figures = compare_tokens(Continuations(ours, reference.logits, reference.best), theirs)
    lost = figures["largest_margin_lost"]
    if not any(theirs):
        problem = "answers no prompt"
    elif not math.isfinite(lost):
        problem = "parts from its reference where that has no finite number"
    elif margin is not None and lost > margin:
        problem = f"takes another token where the best was {lost:.2f} ahead, at most {margin} is rounding"
    if problem:
        raise ModelError(f"{path.name} in llama.cpp {problem}; run 05 again.")
    return figures


def check_folder(
    folder: Path, tokenizer, prompts: Sequence[str], reference: Continuations, judged: bool
) -> dict[str, dict]:
    """Each model in export/gguf where llama.cpp can load it; returns figures by file.

    `reference` continues these prompts first; with `judged`, f16 and q8_0 have to follow it.
    """
    figures, tree = {}, find_llama_cpp()
    for path in sorted(folder.glob("model-*.gguf")):
        kind = path.stem.removeprefix("model-")
        if tree is None or tree.program("llama-server") is None:
            figures[f"gguf_{kind}"] = {"loaded": "no: llama-server was not found"}
            continue
        margin = MARGINS.get(kind) if judged else None
        found = check_gguf(tree, path, tokenizer, prompts, reference, margin)
        figures[f"gguf_{kind}"] = {"level": f"margin {margin}" if margin else "reported", **found}
    return figures


if __name__ == "__main__":
    run_converter(sys.argv[1], sys.argv[2], sys.argv[3:])
