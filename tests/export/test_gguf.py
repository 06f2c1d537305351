"""GGUF by llama.cpp's own tools. What needs a built llama.cpp is marked slow: see the README for how to run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from utils.errors import HardwareError, ModelError
from utils.export import gguf as gguf_files
from utils.export.compare_logits import NEW_TOKENS, Continuations
from utils.export.gguf import LlamaCpp, build_llama_cpp, find_llama_cpp, name_pre_tokenizer
from utils.project import ROOT

LLAMA3 = gguf_files._LLAMA3


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, None),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, None),
        ({"type": "Metaspace", "replacement": "▁"}, None),
        (None, None),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Split", "pattern": {"Regex": LLAMA3}}, {"type": "ByteLevel"}],
            },
            "llama-bpe",
        ),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel"}],
            },
            None,
        ),
    ],
)
def test_a_splitting_rule_has_llama_cpps_name_or_none(tmp_path, rule, name):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": rule}))
    assert name_pre_tokenizer(tmp_path / "tokenizer.json") == name


def test_the_embedded_models_rule_is_gpt_2s(tiny_folder):
    assert name_pre_tokenizer(tiny_folder / "tokenizer.json") == "gpt-2"


def test_a_tree_that_is_not_built_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(
        HardwareError, match=r"lacks convert_hf_to_gguf\.py, convert_lora_to_gguf\.py or a built llama-quantize"
    ):
        find_llama_cpp()
    (tmp_path / "convert_hf_to_gguf.py").touch()
    quantize = tmp_path / "build" / "bin" / "llama-quantize"
    quantize.parent.mkdir(parents=True)
    quantize.touch(mode=0o755)
    with pytest.raises(HardwareError, match=r"lacks .*convert_lora_to_gguf\.py"):
        find_llama_cpp()
    (tmp_path / "convert_lora_to_gguf.py").touch()
    assert find_llama_cpp().program("llama-quantize") == quantize
    monkeypatch.delenv("LLAMA_CPP_DIR")
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", str(tmp_path))  # where unsloth keeps what it downloaded
    assert find_llama_cpp().root == tmp_path


def run_converter(root, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.export.gguf", str(root), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_converter_without_its_package_is_run_as_it_is(tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys\nprint('ran with', *sys.argv[1:])\n")
    done = run_converter(tmp_path, "gpt-2", "merged", "--outtype", "f16")
    assert done.returncode == 0 and done.stdout == "ran with merged --outtype f16\n", done.stderr


def test_a_converter_with_its_package_is_told_the_pre_tokenizers_name(tmp_path):
    (tmp_path / "conversion").mkdir()
    model = "class TextModel:\n    def get_vocab_base_pre(self, tokenizer):\n        raise NotImplementedError\n"
    (tmp_path / "conversion" / "base.py").write_text(model)
    script = "from conversion.base import TextModel\nprint(TextModel().get_vocab_base_pre(None))\n"
    (tmp_path / "convert_hf_to_gguf.py").write_text(script)
    assert run_converter(tmp_path, "gpt-2").stdout == "gpt-2\n"
    assert "NotImplementedError" in run_converter(tmp_path, "").stderr
    (tmp_path / "conversion" / "base.py").write_text("import a_package_that_is_not_installed\n")
    assert "a_package_that_is_not_installed" in run_converter(tmp_path, "gpt-2").stderr  # not taken for its absence


def test_a_build_never_overwrites_and_a_missing_tool_is_named(monkeypatch, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(HardwareError, match="is there already"):
        build_llama_cpp(tmp_path / "there")
    monkeypatch.setattr("tarfile.data_filter", None, raising=False)  # before 3.11.4 that is what is missed first
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    with pytest.raises(HardwareError, match="no-python is not installed"):
        build_llama_cpp(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def answering(monkeypatch, tokens) -> None:
    """In place of llama-server: what splits as the tokenizer does, and answers what it is told to."""
    monkeypatch.setattr(gguf_files, "serve", lambda *_: nullcontext())
    monkeypatch.setattr(gguf_files, "ask", lambda client, path, content, **_: [ord(letter) for letter in content])
    monkeypatch.setattr(gguf_files, "continue_in_llama_cpp", lambda client, ids: tokens)


class Letters:
    eos_token_id = 2

    def __call__(self, prompt):
        return SimpleNamespace(input_ids=[ord(letter) for letter in prompt])


def reference_of(tokens, pairs) -> Continuations:
    best = torch.full((1, NEW_TOKENS, 2), float("nan"))
    best[0, : len(pairs)] = torch.tensor(pairs)
    return Continuations([tokens], torch.zeros(1, 3), best)


@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_figures_of_a_file_say_how_strictly_it_was_judged(monkeypatch, tmp_path, kind):
    (tmp_path / f"model-{kind}.gguf").touch()
    answering(monkeypatch, [5, 6])
    monkeypatch.setattr(gguf_files, "find_llama_cpp", lambda: LlamaCpp(tmp_path))
    monkeypatch.setattr(LlamaCpp, "program", lambda self, name: self.root / name)
    reference = reference_of([5, 6, 2], [(3.0, 1.0)] * 3)
    found = gguf_files.check_folder(tmp_path, Letters(), ["What?"], reference, True)[f"gguf_{kind}"]
    assert found["identical"] == 1
    assert found["level"] == ("margin 0.5" if kind == "f16" else "reported")


@pytest.mark.parametrize("margin", [0.5, None])
@pytest.mark.parametrize("top", [float("nan"), float("inf")])
def test_a_file_that_parts_where_the_reference_has_no_number_is_refused(monkeypatch, tmp_path, margin, top):
    answering(monkeypatch, [5, 7])
    reference = reference_of([5, 6, 2], [(3.0, 1.0), (top, 1.0), (3.0, 1.0)])
    with pytest.raises(ModelError, match=r"model-f16\.gguf .* no finite number"):
        gguf_files.check_gguf(LlamaCpp(tmp_path), tmp_path / "model-f16.gguf", Letters(), ["What?"], reference, margin)


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP_DIR" not in os.environ, reason="needs LLAMA_CPP_DIR, a built llama.cpp")
def test_llama_cpp_and_transformers_read_the_same_model_from_gguf(demo_run, tmp_path):
    """All the claims of benchmarks/results/gguf.json, measured anew."""
    from benchmarks.gguf import measure

    found = measure(demo_run.path, tmp_path)
    assert found["llama.cpp"]["f16"]["identical"] == found["llama.cpp"]["f16"]["prompts"] == 20
    assert found["transformers"]["identical"] == found["transformers"]["prompts"] == 20
    assert found["lora_on_base"]["identical"] == 20
    assert found["llama.cpp"]["q8_0"]["identical"] >= 18 and found["llama.cpp"]["q4_k_m"]["identical"] >= 10
    assert found["card_line"]["same_as_transformers"]
