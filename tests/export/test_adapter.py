"""Exported folders are complete, name no path of this machine, and one that is there is whole."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.exported import QUESTIONS, make_run
from utils.errors import HardwareError, ModelError, RunDirError
from utils.export import adapter as export
from utils.export.adapter import choose_place, copy_adapter, keep_previous, merge_adapter
from utils.export.chat_template import chat_ids, prompt_ids
from utils.export.gguf import write_gguf
from utils.models.tokenizer import load_tokenizer
from utils.pipeline.run_dir import RunDir
from utils.project import ROOT


@pytest.fixture
def trained_run(tiny_folder, tmp_path) -> RunDir:
    return make_run(tiny_folder, tmp_path / "run")


@pytest.fixture
def merged_run(trained_run) -> RunDir:
    copy_adapter(trained_run)
    merge_adapter(trained_run)
    return trained_run


def weights_of(run) -> bytes:
    return run.file("export/merged/model.safetensors").read_bytes()


def test_both_folders_are_complete_and_name_no_path_of_this_machine(merged_run):
    adapter, merged = (merged_run.file(f"export/{kind}") for kind in ("adapter", "merged"))
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in adapter.iterdir()} == tokenizer | {"adapter_config.json", "adapter_model.safetensors"}
    expected = tokenizer | {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in merged.iterdir()} == expected
    for path in (*adapter.glob("*.json"), *merged.glob("*.json")):
        assert str(merged_run.path.parent) not in path.read_text() and "/tmp" not in path.read_text()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("tiny", None)


def test_the_adapter_names_the_commit_that_it_was_trained_on(trained_run):
    hub = {"name": "owner/base", "revision": "c" * 40}
    section = trained_run.config.model.model_copy(update=hub)
    assert export.trained_on(trained_run.config.model_copy(update={"model": section})) == ("owner/base", "c" * 40)


@pytest.mark.parametrize("style", ["native", "tutorial"])
def test_the_exported_tokenizer_loads_by_auto_class_and_gives_the_training_prompt(tiny_folder, tmp_path, style):
    """transformers 4 knows no TokenizersBackend, and LlamaTokenizerFast would lose every space (transformers 45488)."""
    from transformers import AutoTokenizer

    run = make_run(tiny_folder, tmp_path / "run", prompt__style=style)
    copy_adapter(run)
    merge_adapter(run)
    for kind in ("adapter", "merged"):
        folder = run.file(f"export/{kind}")
        assert (
            json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
        )
        theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(tiny_folder)
        for question in QUESTIONS:
            assert chat_ids(theirs, question) == prompt_ids(ours, question, style)


def test_a_merged_folder_is_the_same_whenever_it_is_made(merged_run):
    before = {path.name: path.read_bytes() for path in merged_run.file("export/merged").iterdir()}
    merge_adapter(merged_run)
    assert {path.name: path.read_bytes() for path in merged_run.file("export/merged").iterdir()} == before


def test_an_adapter_of_another_base_is_refused(trained_run):
    path = trained_run.file("training/adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "meta/other-8B"}))
    with pytest.raises(ModelError, match="trained on meta/other-8B, this run's base is tiny"):
        copy_adapter(trained_run)
    assert not trained_run.file("export/adapter").exists()


def test_a_quantised_base_is_refused_before_its_weights_are_read(tiny_folder, trained_run, tmp_path):
    import shutil

    base = shutil.copytree(tiny_folder, tmp_path / "tiny-bnb-4bit")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    copy_adapter(trained_run)
    section = trained_run.config.export.model_copy(update={"base": str(base)})
    trained_run.config = trained_run.config.model_copy(update={"export": section})
    with pytest.raises(ModelError, match=r"tiny-bnb-4bit is quantised.*--set export\.base="):
        merge_adapter(trained_run)


def test_an_adapter_that_is_not_finite_is_refused_and_the_earlier_export_stays(merged_run):
    before = weights_of(merged_run)
    weights = merged_run.file("export/adapter/adapter_model.safetensors")
    tensors = load_file(weights)
    next(value for key, value in tensors.items() if "lora_B" in key)[0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is not finite once the adapter is added"):
        merge_adapter(merged_run)
    assert weights_of(merged_run) == before
    assert not merged_run.file("export/.merged.tmp").exists()


def test_a_disk_that_fills_up_is_told_with_numbers_and_the_earlier_export_stays(merged_run, monkeypatch):
    before = weights_of(merged_run)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(HardwareError, match=r"merged needs 0\.0 GiB at .*, and \d+\.\d GiB are free now"):
        merge_adapter(merged_run)
    assert weights_of(merged_run) == before and not merged_run.file("export/.merged.tmp").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(merged_run, monkeypatch):
    from utils import hardware as platforms

    before = weights_of(merged_run)
    monkeypatch.setattr(platforms, "free_disk_gib", lambda _: 0.01)
    with pytest.raises(HardwareError, match=r"export/merged needs 0\.1 GiB of free disk at .*; found 0\.0 GiB"):
        merge_adapter(merged_run)
    assert weights_of(merged_run) == before


def test_a_target_that_cannot_be_written_is_a_sentence(trained_run, monkeypatch):
    copy_adapter(trained_run)
    make = export.Path.mkdir

    def read_only(self, *arguments, **options):
        if self.name == ".merged.tmp":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(self, *arguments, **options)

    monkeypatch.setattr(export.Path, "mkdir", read_only)
    with pytest.raises(RunDirError, match=r"export/merged could not be written \(Read-only file system\)"):
        merge_adapter(trained_run)
    assert not trained_run.file("export/merged").exists()


def test_a_merge_that_was_killed_leaves_the_earlier_export_and_the_next_one_is_whole(merged_run):
    before = weights_of(merged_run)
    code = f"""
import os, signal, safetensors.torch
from utils.export.adapter import merge_adapter
from utils.pipeline.run_dir import open_run

write = safetensors.torch.save_file

def write_and_die(*arguments, **options):
    write(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

safetensors.torch.save_file = write_and_die
merge_adapter(open_run("auto", {str(merged_run.path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert merged_run.file("export/.merged.tmp/model.safetensors").exists()  # it was in the midst of it
    assert weights_of(merged_run) == before
    merge_adapter(merged_run)
    assert weights_of(merged_run) == before and not merged_run.file("export/.merged.tmp").exists()


def test_on_kaggle_what_does_not_fit_goes_to_scratch_and_the_old_one_is_not_taken_for_it(
    merged_run, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(export, "where", lambda: "kaggle")
    monkeypatch.setattr(export.tempfile, "gettempdir", lambda: str(tmp_path / "scratch"))
    assert choose_place(merged_run, "merged", 0.1) == merged_run.file("export/merged")
    monkeypatch.setattr(export, "free_disk_gib", lambda _: 16.5)
    place = choose_place(merged_run, "merged", 16.0)
    assert place.is_relative_to(tmp_path / "scratch") and "16.0 GiB" in capsys.readouterr().out
    assert not merged_run.file("export/merged").exists() and merged_run.file("export/merged.previous").exists()


def test_an_earlier_export_is_kept_as_previous_where_none_is_wanted(merged_run):
    section = merged_run.config.export.model_copy(update={"merged": False})
    merged_run.config = merged_run.config.model_copy(update={"export": section})
    assert merge_adapter(merged_run) is None
    keep_previous(merged_run, "merged")  # nothing left to move: the one from before stays
    assert merged_run.file("export/merged.previous/model.safetensors").exists()


def test_without_llama_cpp_the_stage_says_which_command_makes_the_files(merged_run, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", str(tmp_path / "nothing"))
    folders = {kind: merged_run.file(f"export/{kind}") for kind in ("adapter", "merged")}
    assert write_gguf(merged_run, folders) is None
    said = capsys.readouterr().out
    assert f"run --run-dir {merged_run.path} --set export.install_llama_cpp=true" in said


def test_the_merged_model_loads_and_differs_from_the_base(merged_run, tiny_folder):
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.inference_mode():
        base, merged = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (tiny_folder, merged_run.file("export/merged"))
        )
    assert (base - merged).abs().max() > 1e-3
