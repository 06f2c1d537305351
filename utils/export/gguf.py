"""GGUF files by llama.cpp's own converter and quantiser: the merged model, and the LoRA alone.

llama.cpp knows a pre-tokenizer by a hash over what it makes of a test text, and refuses a vocabulary that it has never
seen, the demo's among them. But what has to be named is only the rule that splits text before byte pairs are merged,
and tokenizer.json says which that is. So where the converter's own table fails, the name follows from that rule, and
the server's token ids are compared with the tokenizer's before anything is believed.
"""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.data.prompts import format_prompt
from utils.errors import HardwareError, ModelError
from utils.export.chat_template import prompt_ids, read_modelfile, render_modelfile
from utils.export.compare_logits import NEW_TOKENS, Continuations, common_start, larger
from utils.export.llama_cpp import LlamaCpp, LlamaServer
from utils.project import ROOT, python_path

F16_LARGEST = 65504.0
LORA = "adapter-f32.gguf"  # the factors are small: kept as they are
# How far the best token may lie above the second, in logits, where another arithmetic still takes the second.
MARGINS = {"f16": 0.5, "q8_0": 1.0}
_LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"


def file_name(kind: str) -> str:
    """model-q4_k_m.gguf and so on."""
    return f"model-{kind}.gguf"


def name_pre_tokenizer(tokenizer_json: Path) -> str | None:
    """llama.cpp's name for the splitting rule in a tokenizer.json: gpt-2, llama-bpe, or None for another rule."""
    rule = json.loads(tokenizer_json.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    parts = rule.get("pretokenizers", [rule])
    if len(parts) == 1 and parts[0].get("type") == "ByteLevel":
        plain = parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space", False)
        return "gpt-2" if plain else None
    if len(parts) == 2 and [part.get("type") for part in parts] == ["Split", "ByteLevel"]:
        return "llama-bpe" if parts[0].get("pattern", {}).get("Regex") == _LLAMA3 else None
    return None


def write_gguf(
    tree: LlamaCpp, merged: Path, adapter: Path, folder: Path, kinds: Sequence[str], largest_weight: float
) -> dict[str, int]:
    """Write the `kinds` (f16, q8_0, q4_k_m) of the merged model and the LoRA's GGUF into `folder`.

    Returns {file: tensors that were stored more finely than asked, since their rows are no multiple of 256}. Raises
    ModelError where the converter or quantiser refuses, or a weight is too large for f16.
    """
    if largest_weight > F16_LARGEST:
        raise ModelError(
            f"The largest merged weight is {largest_weight:.0f}, f16 ends at {F16_LARGEST:.0f}; set export.gguf=[]."
        )
    whole = folder / file_name("f16")
    arguments = [str(tree.root), name_pre_tokenizer(merged / "tokenizer.json") or "", str(merged)]
    _call([sys.executable, "-m", "utils.export.gguf", *arguments, "--outfile", str(whole), "--outtype", "f16"])
    finer = {whole.name: 0}
    for kind in kinds:
        if kind == "f16":
            continue
        quantize = str(tree.program("llama-quantize"))
        output = _call([quantize, str(whole), str(folder / file_name(kind)), kind.upper()])
        finer[file_name(kind)] = len(re.findall("falling back to", output))
    if "f16" not in kinds:
        whole.unlink()
        del finer[whole.name]
    convert = [sys.executable, str(tree.root / "convert_lora_to_gguf.py"), "--base", str(merged)]
    _call([*convert, "--outtype", "f32", "--outfile", str(folder / LORA), str(adapter)])
    return finer | {LORA: 0}


def _call(command: list[str]) -> str:
    answer = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        check=False,
        encoding="utf-8",
        errors="replace",  # llama-quantize cuts long strings in the middle of a character
    )
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or answer.stdout.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"llama.cpp's {Path(command[0]).name} failed ({last[:300]}); set export.gguf=[] to go without."
        )
    return answer.stdout + answer.stderr


def check_modelfile(path: Path, tokenizer, questions: Sequence[str], style: str) -> dict[str, int | str]:
    """Compare what Ollama would send with the training prompt, token by token; raises ModelError where they differ."""
    modelfile = read_modelfile(path.read_text(encoding="utf-8"))
    for question in questions:
        sent = tokenizer(render_modelfile(modelfile, question)).input_ids
        if sent != prompt_ids(tokenizer, question, style):
            raise ModelError(f"{path} gives another prompt than training for {question[:60]!r}; run 05 again.")
    stops = [tokenizer(text, add_special_tokens=False).input_ids for text in modelfile.parameters.get("stop", [])]
    if stops != [[tokenizer.eos_token_id]]:
        raise ModelError(f"{path} stops at the tokens {stops}, expected [[{tokenizer.eos_token_id}]]; run 05 again.")
    if not (path.parent / modelfile.source).is_file():
        raise ModelError(f"{path} is made from {modelfile.source}, which is not there; run 05 again.")
    return {"prompts": len(questions), "prompt": "equal to the token", "stop": tokenizer.eos_token}


def check_gguf(
    tree: LlamaCpp, path: Path, tokenizer, prompts: Sequence[str], reference: Continuations, margin: float | None
) -> dict[str, float | int | str]:
    """Load a file in llama.cpp and compare token ids of prompts, and greedy continuations, with the reference.

    `margin`: where they part, the reference's best token may lie so far above its second; None: only reported. Raises
    ModelError where prompts are split otherwise, where the margin is exceeded, or where nothing is answered.
    """
    identical, common, lost, answered = 0, 0, 0.0, 0
    with LlamaServer(tree, path) as server:
        for number, prompt in enumerate(prompts):
            ids = tokenizer(prompt).input_ids
            if server.tokenize(prompt) != ids:
                raise ModelError(f"{path.name} splits a prompt into other tokens than the tokenizer; run 05 again.")
            ours = [token for token in reference.tokens[number] if token != tokenizer.eos_token_id]
            theirs = server.continue_greedily(ids, NEW_TOKENS)
            theirs = [token for token in theirs if token != tokenizer.eos_token_id]
            same = common_start(ours, theirs)
            answered += bool(theirs)
            common += same
            if ours == theirs:
                identical += 1
            elif same < NEW_TOKENS:
                top, second = reference.best[number, same].tolist()
                lost = larger(lost, top - second)
    figures = {
        "prompts": len(prompts),
        "identical": identical,
        "mean_common_tokens": round(common / len(prompts), 1),
        "largest_margin_lost": round(lost, 4),
    }
    if not answered:
        raise ModelError(f"{path.name} answered none of {len(prompts)} prompts in llama.cpp; run 05 again.")
    if not math.isfinite(lost):
        raise ModelError(f"{path.name} parts from its reference where that has no finite number; run 05 again.")
    if margin is not None and not lost <= margin:
        raise ModelError(
            f"{path.name} in llama.cpp takes another token where the merged model's best was {lost:.2f} ahead, at most "
            f"{margin} is rounding; run 05 again."
        )
    return figures


def check_folder(
    tree: LlamaCpp | None,
    folder: Path,
    tokenizer,
    questions: Sequence[str],
    style: str,
    reference: Continuations,
    judged: bool,
    against: str,
) -> dict[str, Mapping]:
    """The Modelfile, and each model in export/gguf where llama.cpp can load it; returns figures by file.

    `reference` holds the continuations of these questions first, by the model that `against` names; with `judged`, f16
    and q8_0 have to follow it.
    """
    figures: dict[str, Mapping] = {"modelfile": check_modelfile(folder / "Modelfile", tokenizer, questions, style)}
    prompts = [format_prompt(question, style) for question in questions]
    for path in sorted(folder.glob("model-*.gguf")):
        kind = path.stem.removeprefix("model-")
        if tree is None or tree.program("llama-server") is None:
            figures[f"gguf_{kind}"] = {"loaded": "no: llama-server was not found"}
            continue
        margin = MARGINS.get(kind) if judged else None
        level = "reported" if margin is None else f"margin {margin}"
        found = check_gguf(tree, path, tokenizer, prompts, reference, margin)
        figures[f"gguf_{kind}"] = {"against": against, "level": level, **found}
    return figures


def _convert(root: str, known_as: str, arguments: list[str]) -> None:
    """Run llama.cpp's converter as it is, with one more answer to which pre-tokenizer this is.

    A converter that is one file, as llama.cpp's was, has no class to teach that: it gets by with its own table.
    """
    sys.path.insert(0, root)
    if (Path(root) / "conversion" / "base.py").is_file():
        _teach(known_as)
    sys.argv = [str(Path(root) / "convert_hf_to_gguf.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _teach(known_as: str) -> None:
    from conversion.base import TextModel

    ask = TextModel.get_vocab_base_pre

    def name(self, tokenizer) -> str:
        try:
            return ask(self, tokenizer)
        except NotImplementedError:
            if not known_as:
                raise HardwareError(
                    "llama.cpp does not know this pre-tokenizer, nor does its rule have a name."
                ) from None
            return known_as

    TextModel.get_vocab_base_pre = name


if __name__ == "__main__":
    _convert(sys.argv[1], sys.argv[2], sys.argv[3:])
