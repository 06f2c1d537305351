"""GGUF files by llama.cpp's own converter and quantiser, and its server's answers held against the model in memory.

`python -m utils.export.gguf CONVERTER ...` is that converter for a vocabulary that llama.cpp has never seen.
"""

import json
import os
import runpy
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import tenacity

from utils.errors import HardwareError, ModelError, UserError
from utils.export.chat_template import make_modelfile
from utils.export.compare_logits import NEW_TOKENS, Continuations, compare_tokens
from utils.export.places import scratch_folder
from utils.files import atomic_folder
from utils.hardware import GIB, require_disk
from utils.pipeline.run_dir import RunDir
from utils.processes import Child

if TYPE_CHECKING:
    from utils.export.plan import Plan  # which imports this module

SOURCE = "llama-cpp-python==0.3.36"  # its source distribution carries llama.cpp, converter and all
BITS = {"q4_k_m": 4.9, "q8_0": 8.5, "f16": 16.0}  # of a file, for each weight; the smallest first
LORA = "adapter-f32.gguf"  # the factors are small: kept as they are
# How far the best token may lie above the second, in logits, where another arithmetic still takes the second.
MARGINS = {"f16": 0.5, "q8_0": 1.0}
_HOME = Path.home() / ".unsloth" / "llama.cpp"
_CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
_START_S = 600  # a 16 GB file from a slow disk
_NOT_BUILT = HardwareError, "llama.cpp was not built: take another machine, or set export.install_llama_cpp=false"
_NOT_CONVERTED = ModelError, "set export.gguf=[] to go without"


def find_program(tree: Path, name: str) -> Path | None:
    """The program called `name` of a llama.cpp tree; None where it was not built."""
    places = (tree / name, tree / "build" / "bin" / name)
    return next((path for path in places if os.access(path, os.X_OK) and path.is_file()), None)


def find_llama_cpp() -> Path | None:
    """The tree in LLAMA_CPP_DIR, or the one that unsloth keeps; None where neither has converters and quantiser."""
    named = os.environ.get("LLAMA_CPP_DIR")
    tree = Path(named or os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or _HOME).expanduser().resolve()
    if all((tree / name).exists() for name in _CONVERTERS) and find_program(tree, "llama-quantize"):
        return tree
    if named:
        lack = f"{', '.join(_CONVERTERS)} or a built llama-quantize"
        raise HardwareError(f"LLAMA_CPP_DIR is {named}, which lacks {lack}; unset it, or name a built tree.")
    return None


def install_llama_cpp(build: bool) -> Path | None:
    """unsloth's ready build, in a minute, where unsloth is there and reaches it; else built from source or None."""
    # Not its install_llama_cpp, which compiles, as root, where there is no ready build for this machine.
    fetch = (
        "import sys, unsloth_zoo.llama_cpp as u; sys.exit(not u._install_llama_cpp_prebuilt(u.LLAMA_CPP_DEFAULT_DIR))"
    )
    with suppress(HardwareError):
        _call([sys.executable, "-c", fetch], *_NOT_BUILT)
        if tree := find_llama_cpp():
            return tree
    return build_llama_cpp(_HOME) if build else None


def build_llama_cpp(folder: Path) -> Path:
    """Download the pinned source by pip and build it with cmake; where that fails, nothing is left at `folder`."""
    if folder.exists():
        raise HardwareError(f"{folder} is there already, without what is needed of llama.cpp; delete it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", SOURCE]
        _call([*pip, "--dest", scratch], *_NOT_BUILT)
        (archive,) = Path(scratch).glob("llama_cpp_python-*.tar.gz")
        # The program, not Python's module, which refuses what would leave the folder from 3.11.4 on only.
        _call(["tar", "-xzf", archive, "-C", scratch], *_NOT_BUILT)
        (tree,) = Path(scratch).glob("llama_cpp_python-*/vendor/llama.cpp")
        # Makefiles, not ninja: the archive's dates lie in the future of some machines, and ninja never gets done then.
        # Static, and without what asks a network for parts: the tree can be moved and the build needs nothing more.
        switches = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "USE_PREBUILT_UI")
        options = [f"-DLLAMA_{name}=OFF" for name in switches] + ["-DBUILD_SHARED_LIBS=OFF"]
        made = ["-S", tree, "-B", tree / "build", "-G", "Unix Makefiles", "-DCMAKE_BUILD_TYPE=Release", *options]
        _call(["cmake", *made], *_NOT_BUILT)
        targets = [f"llama-{name}" for name in ("quantize", "completion", "server")]
        jobs = ["--parallel", str(os.cpu_count() or 1)]
        _call(["cmake", "--build", tree / "build", *jobs, "--target", *targets], *_NOT_BUILT)
        shutil.move(tree, folder)
    return folder


def _call(words: Sequence[str | Path], kind: type[UserError], advice: str) -> None:
    """Run a program; raises `kind` with its last line where it fails or is not installed."""
    print("+", *words, flush=True)
    if shutil.which(words[0]) is None:
        raise kind(f"{words[0]} is not installed, which llama.cpp is built with; {advice}.")
    with tempfile.TemporaryDirectory() as scratch:
        printed = Path(scratch) / "stdout"  # apart: cmake's last line there says nothing of the reason
        with Child(["sh", "-c", 'exec "$@" > "$0"', printed, *words], Path(scratch) / "stderr") as child:
            if child.wait() == 0:
                return
        child.log = child.log if child.log.stat().st_size else printed
        raise kind(f"llama.cpp's {Path(words[0]).name} failed ({child.last_words()}); {advice}.")


def file_name(kind: str) -> str:
    """model-q4_k_m.gguf and so on."""
    return f"model-{kind}.gguf"


def write_gguf(run: RunDir, plan: "Plan") -> Path | None:
    """export/gguf: the merged model and the LoRA for llama.cpp, and a Modelfile for Ollama; None where none is planned.

    Of what was only needed on the way, nothing stays. Raises ModelError, and HardwareError where the disk is too small.
    """
    config, target, here = run.config, plan.places.get("gguf"), run.file("export/gguf")
    if target != here:
        shutil.rmtree(here, ignore_errors=True)  # an earlier run's
    if target is None:
        return None
    scratch = scratch_folder(run, "f16")
    weights = sum(path.stat().st_size for path in plan.merged.glob("*.safetensors")) / GIB
    try:
        require_disk(target.parent, sum(weights * BITS[kind] / 16 for kind in plan.kinds), "export/gguf")
        require_disk(scratch, weights * ("f16" not in plan.kinds), "The 16-bit GGUF")
        scratch.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) as folder:
            convert(plan.llama_cpp, plan.merged, run.file("export/adapter"), folder, plan.kinds, scratch)
            smallest = file_name(min(plan.kinds, key=BITS.get))
            text = make_modelfile(smallest, config.prompt, config.generate, config.model.max_seq_length)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if "merged" not in plan.places:
            shutil.rmtree(plan.merged, ignore_errors=True)
    return target


def convert(
    tree: Path, merged: Path, adapter: Path, folder: Path, kinds: Sequence[str], scratch: Path | None = None
) -> None:
    """Write the `kinds` (f16, q8_0, q4_k_m) of the merged model and the LoRA's GGUF; raises ModelError if it cannot be.

    An f16 that is none of them is made in `scratch`, `folder` by default, and deleted.
    """
    whole = (folder if "f16" in kinds else scratch or folder) / file_name("f16")
    model_script, lora_script = (tree / name for name in _CONVERTERS)
    ours = ["-m", "utils.export.gguf"] if name_pre_tokenizer(merged / "tokenizer.json") else []
    _call([sys.executable, *ours, model_script, merged, "--outfile", whole, "--outtype", "f16"], *_NOT_CONVERTED)
    for kind in set(kinds) - {"f16"}:
        _call([find_program(tree, "llama-quantize"), whole, folder / file_name(kind), kind.upper()], *_NOT_CONVERTED)
    lora = [sys.executable, lora_script, "--base", merged, "--outtype", "f32", "--outfile", folder / LORA, adapter]
    _call(lora, *_NOT_CONVERTED)
    if "f16" not in kinds:
        whole.unlink()


def name_pre_tokenizer(tokenizer_json: Path) -> str | None:
    """gpt-2 where a tokenizer.json splits text by that rule before byte pairs are merged, else None."""
    rule = json.loads(tokenizer_json.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    plain = rule.get("use_regex", True) and not rule.get("add_prefix_space", False)
    return "gpt-2" if rule.get("type") == "ByteLevel" and plain else None


def run_converter(script: str, *arguments: str) -> None:
    """Run llama.cpp's converter on a model that splits text as GPT-2; it refuses vocabularies it never saw."""
    root = Path(script).parent
    sys.path.insert(0, str(root))
    if (root / "conversion" / "base.py").is_file():
        from conversion.base import TextModel

        known = TextModel.get_vocab_base_pre

        def name(self, tokenizer) -> str:
            try:
                return known(self, tokenizer)
            except NotImplementedError:
                return "gpt-2"

        TextModel.get_vocab_base_pre = name
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


@contextmanager
def serve(tree: Path, model: Path, lora: Path | None = None) -> Iterator[httpx.Client]:
    """A client of `llama-server` on a file, on this machine; raises ModelError where llama.cpp cannot load it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [find_program(tree, "llama-server"), "-m", model, "--port", port, *(["--lora", lora] if lora else [])]
    words += "--host 127.0.0.1 -c 4096 -np 1".split()
    with (
        tempfile.TemporaryDirectory() as scratch,
        Child(words, Path(scratch) / "log") as child,
        # A proxy has no business here.
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_START_S, trust_env=False) as client,
    ):
        loading = tenacity.Retrying(
            stop=lambda state: child.poll() is not None or state.seconds_since_start > _START_S,
            wait=tenacity.wait_fixed(0.1),
        )
        try:
            loading(lambda: client.get("/health").raise_for_status())
        except tenacity.RetryError:
            raise ModelError(f"llama.cpp could not load {model}: {child.last_words()}") from None
        yield client


def ask(client: httpx.Client, path: str, **wanted) -> list[int]:
    """The tokens of the server's answer."""
    return client.post(path, json=wanted).raise_for_status().json()["tokens"]


def continue_in_llama_cpp(client: httpx.Client, ids: Sequence[int]) -> list[int]:
    """Up to NEW_TOKENS greedy token ids after `ids`."""
    options = {"temperature": 0, "return_tokens": True, "cache_prompt": False}
    return ask(client, "/completion", prompt=list(ids), n_predict=NEW_TOKENS, **options)


def check_gguf(
    tree: Path, path: Path, tokenizer, prompts: Sequence[str], reference: Continuations, margin: float | None
) -> dict[str, float | int]:
    """Hold prompts' token ids and greedy continuations in llama.cpp against the reference's; see MARGINS."""
    end, theirs = tokenizer.eos_token_id, []
    with serve(tree, path) as client:
        for prompt in prompts:
            ids = tokenizer(prompt).input_ids
            if ask(client, "/tokenize", content=prompt, add_special=True, parse_special=True) != ids:
                raise ModelError(f"{path.name} splits a prompt into other tokens than the tokenizer; run 05 again.")
            theirs.append([token for token in continue_in_llama_cpp(client, ids) if token != end])
    if not any(theirs):
        raise ModelError(f"{path.name} in llama.cpp answers no prompt; run 05 again.")
    # llama.cpp leaves the end token out.
    ours = [[token for token in tokens if token != end] for tokens in reference.tokens[: len(prompts)]]
    figures = compare_tokens(Continuations(ours, reference.logits, reference.best), theirs)
    lost = figures["largest_margin_lost"]
    if margin is not None and not lost <= margin:  # NaN is no agreement
        found = f"takes another token where the best was {lost:.2f} ahead"
        raise ModelError(f"{path.name} in llama.cpp {found}, at most {margin} is rounding; run 05 again.")
    return figures


def check_folder(
    folder: Path, tokenizer, prompts: Sequence[str], reference: Continuations, judged: bool
) -> dict[str, dict]:
    """`check_gguf` of each model in export/gguf, where there is a server; `judged`: f16 and q8_0 have to follow."""
    figures, tree = {}, find_llama_cpp()
    for path in sorted(folder.glob("model-*.gguf")):
        kind = path.stem.removeprefix("model-")
        if tree is None or find_program(tree, "llama-server") is None:
            figures[f"gguf_{kind}"] = {"loaded": "no: llama-server was not found"}
            continue
        margin = MARGINS.get(kind) if judged else None
        found = check_gguf(tree, path, tokenizer, prompts, reference, margin)
        figures[f"gguf_{kind}"] = {"level": f"margin {margin}" if margin else "reported", **found}
    return figures


if __name__ == "__main__":
    run_converter(*sys.argv[1:])
