"""GGUF files by llama.cpp's own converter and quantiser, and its server's answers held against the model in memory.

`python -m utils.export.gguf CONVERTER ...` is that converter for a vocabulary that llama.cpp has never seen.
"""

import os
import runpy
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import tenacity

from utils.errors import HardwareError, ModelError, UserError
from utils.export.adapter import merge_adapter
from utils.export.chat_template import make_modelfile
from utils.export.compare_logits import NEW_TOKENS, Continuations, compare_tokens
from utils.export.places import Plan, scratch_folder
from utils.files import atomic_folder, read_json
from utils.hardware import GIB, require_disk, where
from utils.pipeline.stage import StageRun
from utils.processes import Child

BITS = {"q4_k_m": 4.9, "q8_0": 8.5, "f16": 16.0}  # of a file, for each weight; the smallest first
LORA = "adapter-f32.gguf"  # the factors are small: kept as they are
# How far the best token may lie above the second, in logits, where another arithmetic still takes the second.
MARGINS = {"f16": 0.5, "q8_0": 1.0}
HOME = Path.home() / ".unsloth" / "llama.cpp"  # where unsloth keeps it
_CONVERTER, _OF_LORA = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"  # unsloth's build has no second one
_START_S = 600  # a 16 GB file from a slow disk


def find_program(tree: Path, name: str) -> Path | None:
    """The program called `name` of a llama.cpp tree; None where it was not built."""
    places = (tree / name, tree / "build" / "bin" / name)
    return next((path for path in places if os.access(path, os.X_OK) and path.is_file()), None)


def find_llama_cpp() -> Path | None:
    """The tree in LLAMA_CPP_DIR, or the one that unsloth keeps; None where neither has converter and quantiser."""
    named = os.environ.get("LLAMA_CPP_DIR")
    tree = Path(named or os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or HOME).expanduser().resolve()
    if (tree / _CONVERTER).exists() and find_program(tree, "llama-quantize"):
        return tree
    if named:
        lack = f"{_CONVERTER} or a built llama-quantize"
        raise HardwareError(f"LLAMA_CPP_DIR is {named}, which lacks {lack}; unset it, or name a built tree.")
    return None


def fetch_llama_cpp() -> Path | None:
    """unsloth's ready build, in a minute; None where unsloth is not installed or has none for this machine."""
    # Not its install_llama_cpp, which compiles, as root, where there is no ready build.
    fetch = (
        "import sys, unsloth_zoo.llama_cpp as u; sys.exit(not u._install_llama_cpp_prebuilt(u.LLAMA_CPP_DEFAULT_DIR))"
    )
    try:
        _call([sys.executable, "-c", fetch])
    except ModelError as error:
        print(f"unsloth's build of llama.cpp was not fetched: {error}")
    return find_llama_cpp()


def _call(words: Sequence[str | Path]) -> None:
    """Run a program; raises ModelError with its last line where it fails."""
    print("+", *words, flush=True)
    with tempfile.TemporaryDirectory() as scratch, Child(words, Path(scratch) / "log") as child:
        if child.wait():
            failed = f"llama.cpp's {Path(words[0]).name} failed ({child.last_words()})"
            raise ModelError(f"{failed}; set export.gguf=[] to go without.")


def file_name(kind: str) -> str:
    """model-q4_k_m.gguf and so on."""
    return f"model-{kind}.gguf"


def write_gguf(run: StageRun, plan: Plan) -> Path | None:
    """export/gguf: the merged model and the LoRA for llama.cpp, and a Modelfile for Ollama; None where none is planned.

    Raises ModelError and HardwareError; on Kaggle and Colab these are a sentence of the plan, and the stage goes on.
    """
    if "gguf" not in plan.places:
        shutil.rmtree(run.file("export/gguf"), ignore_errors=True)  # an earlier run's
        return None
    try:
        return _convert_all(run, plan, plan.places["gguf"])
    except UserError as error:
        if where() == "local":
            raise
        del plan.places["gguf"]
        plan.left_out["gguf"] = str(error)
        print(f"gguf is not made: {error}")
        return None
    finally:
        shutil.rmtree(scratch_folder(run, "on_the_way"), ignore_errors=True)


def _convert_all(run: StageRun, plan: Plan, target: Path) -> Path:
    """A merged model that is no export, and an f16 that is none, are made in scratch."""
    scratch = scratch_folder(run, "on_the_way")
    merged = plan.places.get("merged") or merge_adapter(run, scratch / "merged")
    weights_gib = sum(path.stat().st_size for path in merged.glob("*.safetensors")) / GIB
    require_disk(scratch, weights_gib * sum(BITS[kind] / 16 for kind in {*plan.kinds, "f16"}), "export/gguf")
    scratch.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as folder:
        convert(plan.llama_cpp, merged, run.file("export/adapter"), folder, plan.kinds, scratch)
        config, smallest = run.config, file_name(min(plan.kinds, key=BITS.get))
        context = max(config.model.max_seq_length, 2 * config.generate.max_new_tokens)
        text = make_modelfile(smallest, config.prompt, config.generate, context)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    return target


def convert(
    tree: Path, merged: Path, adapter: Path, folder: Path, kinds: Sequence[str], scratch: Path | None = None
) -> None:
    """Write the `kinds` (f16, q8_0, q4_k_m) of the merged model and the LoRA's GGUF; raises ModelError if it cannot be.

    An f16 that is none of them is made in `scratch`, `folder` by default, and deleted.
    """
    whole = (folder if "f16" in kinds else scratch or folder) / file_name("f16")
    ours = ["-m", "utils.export.gguf"] if name_pre_tokenizer(merged / "tokenizer.json") else []
    _call([sys.executable, *ours, tree / _CONVERTER, merged, "--outfile", whole, "--outtype", "f16"])
    for kind in set(kinds) - {"f16"}:
        _call([find_program(tree, "llama-quantize"), whole, folder / file_name(kind), kind.upper()])
    if (script := tree / _OF_LORA).exists():
        _call([sys.executable, script, "--base", merged, "--outtype", "f32", "--outfile", folder / LORA, adapter])
    if "f16" not in kinds:
        whole.unlink()


def name_pre_tokenizer(tokenizer_json: Path) -> str | None:
    """gpt-2 where a tokenizer.json splits text by that rule before byte pairs are merged, else None."""
    rule = read_json(tokenizer_json).get("pre_tokenizer") or {}
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
    """The tokens of the server's answer; raises ModelError where there is none."""
    try:
        return client.post(path, json=wanted).raise_for_status().json()["tokens"]
    except httpx.HTTPError as error:
        raise ModelError(f"llama-server gave no answer ({type(error).__name__}); run 05 again.") from None


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
        try:
            found = check_gguf(tree, path, tokenizer, prompts, reference, margin)
        except ModelError as error:
            if where() == "local":
                raise
            figures[f"gguf_{kind}"] = {"loaded": f"no: deleted again, since {error}"}  # as the card says
            path.unlink()  # what did not pass is not uploaded
            continue
        figures[f"gguf_{kind}"] = {"level": f"margin {margin}" if margin else "reported", **found}
    return figures


if __name__ == "__main__":
    run_converter(*sys.argv[1:])
