"""GGUF by llama.cpp's own tools. What needs a built llama.cpp is marked slow: see the README for how to run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch

from utils.errors import HardwareError, ModelError
from utils.export import gguf as gguf_files
from utils.export.compare_logits import NEW_TOKENS, Continuations
from utils.export.gguf import find_llama_cpp, find_program, name_pre_tokenizer
from utils.project import ROOT


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, None),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, None),
        ({"type": "Metaspace", "replacement": "▁"}, None),
        (None, None),
        ({"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}, None),
    ],
)
def test_a_splitting_rule_has_llama_cpps_name_or_none(tmp_path, rule, name):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": rule}))
    assert name_pre_tokenizer(tmp_path / "tokenizer.json") == name


def test_the_embedded_models_rule_is_gpt_2s(tiny_folder):
    assert name_pre_tokenizer(tiny_folder / "tokenizer.json") == "gpt-2"


def test_a_tree_that_is_not_built_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(HardwareError, match=r"lacks convert_hf_to_gguf\.py or a built llama-quantize"):
        find_llama_cpp()
    (tmp_path / "convert_hf_to_gguf.py").touch()  # unsloth's build has no converter for a LoRA alone
    quantize = tmp_path / "build" / "bin" / "llama-quantize"
    quantize.parent.mkdir(parents=True)
    quantize.touch(mode=0o755)
    assert find_program(find_llama_cpp(), "llama-quantize") == quantize
    monkeypatch.delenv("LLAMA_CPP_DIR")
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", str(tmp_path))  # where unsloth keeps what it downloaded
    assert find_llama_cpp() == tmp_path


def run_converter(root, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.export.gguf", str(root / "convert_hf_to_gguf.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_converter_without_its_package_is_run_as_it_is(tmp_path):
    (tmp_path / "convert_hf_to_gguf.py").write_text("import sys\nprint('ran with', *sys.argv[1:])\n")
    done = run_converter(tmp_path, "merged", "--outtype", "f16")
    assert done.returncode == 0 and done.stdout == "ran with merged --outtype f16\n", done.stderr


def test_a_converter_with_its_package_is_told_the_pre_tokenizers_name(tmp_path):
    (tmp_path / "conversion").mkdir()
    model = "class TextModel:\n    def get_vocab_base_pre(self, tokenizer):\n        raise NotImplementedError\n"
    (tmp_path / "conversion" / "base.py").write_text(model)
    script = "from conversion.base import TextModel\nprint(TextModel().get_vocab_base_pre(None))\n"
    (tmp_path / "convert_hf_to_gguf.py").write_text(script)
    assert run_converter(tmp_path).stdout == "gpt-2\n"
    (tmp_path / "conversion" / "base.py").write_text("import a_package_that_is_not_installed\n")
    assert "a_package_that_is_not_installed" in run_converter(tmp_path).stderr  # not taken for its absence


@pytest.mark.parametrize("code", ["sys.stderr.write('the reason\\n')", "print('the reason')"])
def test_a_program_that_fails_is_told_with_its_last_line(code):
    words = [sys.executable, "-c", f"import sys; {code}; sys.exit(1)"]
    with pytest.raises(ModelError, match=rf"{Path(sys.executable).name} failed \(the reason\); set export\.gguf=\[\]"):
        gguf_files._call(words)


@pytest.mark.parametrize("fetched", [True, False])
def test_unsloths_ready_build_is_fetched_where_there_is_one_and_nothing_is_compiled(
    monkeypatch, tmp_path, capsys, fetched
):
    called = []

    def call(words):
        called.append(words[-1])
        if not fetched:
            raise ModelError("python failed (No module named unsloth_zoo)")

    monkeypatch.setattr(gguf_files, "_call", call)
    monkeypatch.setattr(gguf_files, "find_llama_cpp", lambda: tmp_path / "unsloth" if fetched else None)
    assert gguf_files.fetch_llama_cpp() == (tmp_path / "unsloth" if fetched else None)
    assert ("was not fetched: python failed (No module named unsloth_zoo)" in capsys.readouterr().out) != fetched
    assert len(called) == 1 and "_install_llama_cpp_prebuilt(" in called[0]
    compile(called[0], "-c", "exec")


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
    monkeypatch.setattr(gguf_files, "find_llama_cpp", lambda: tmp_path)
    monkeypatch.setattr(gguf_files, "find_program", lambda tree, name: tree / name)
    reference = reference_of([5, 6, 2], [(3.0, 1.0)] * 3)
    found = gguf_files.check_folder(tmp_path, Letters(), ["What?"], reference, True)[f"gguf_{kind}"]
    assert found["identical"] == 1
    assert found["level"] == ("margin 0.5" if kind == "f16" else "reported")


@pytest.mark.parametrize("here", ["local", "kaggle"])
def test_a_file_that_is_refused_ends_the_stage_at_home_and_is_told_by_its_card_on_kaggle(monkeypatch, tmp_path, here):
    (tmp_path / "model-q4_k_m.gguf").touch()
    answering(monkeypatch, [])
    monkeypatch.setattr(gguf_files, "find_llama_cpp", lambda: tmp_path)
    monkeypatch.setattr(gguf_files, "find_program", lambda tree, name: tree / name)
    monkeypatch.setattr(gguf_files, "where", lambda: here)
    reference = reference_of([5, 6, 2], [(3.0, 1.0)] * 3)
    with pytest.raises(ModelError, match="answers no prompt") if here == "local" else nullcontext():
        found = gguf_files.check_folder(tmp_path, Letters(), ["What?"], reference, False)
        assert "deleted again, since model-q4_k_m.gguf in llama.cpp answers no prompt" in found["gguf_q4_k_m"]["loaded"]
        assert not list(tmp_path.glob("*.gguf"))  # so it is not uploaded


def test_a_server_that_gives_no_answer_is_a_sentence():
    refused = httpx.Client(
        transport=httpx.MockTransport(lambda request: httpx.Response(500)), base_url="http://127.0.0.1"
    )
    with pytest.raises(ModelError, match=r"llama-server gave no answer \(HTTPStatusError\)"):
        gguf_files.ask(refused, "/completion", prompt=[1])


@pytest.mark.parametrize("top", [3.0, float("nan"), float("inf")])
def test_a_file_that_takes_another_token_where_the_reference_was_sure_is_refused(monkeypatch, tmp_path, top):
    answering(monkeypatch, [5, 7])
    reference = reference_of([5, 6, 2], [(3.0, 1.0), (top, 1.0), (3.0, 1.0)])
    with pytest.raises(ModelError, match=r"model-f16\.gguf .* takes another token"):
        gguf_files.check_gguf(tmp_path, tmp_path / "model-f16.gguf", Letters(), ["What?"], reference, 0.5)


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
