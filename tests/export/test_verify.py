"""Exports are loaded back in a process of their own; whatever was changed on the way is found."""

from __future__ import annotations

import json
import shutil
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.exported import make_run, write_evidence
from utils.errors import ModelError, RunDirError
from utils.export.adapter import copy_adapter, merge_adapter
from utils.export.compare_logits import Continuations
from utils.export.model_card import write_cards
from utils.export.places import export_folders
from utils.export.verify import (
    REFERENCE,
    choose_tolerances,
    verify_exports,
    write_record,
    write_reference,
)
from utils.files import write_text
from utils.hardware import resolve_hardware
from utils.pipeline.run_dir import open_run
from utils.pipeline.stages import BY_NAME
from utils.project import ROOT


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    """A run with every export, verified; read it, or copy it."""
    run = make_run(tiny_folder, tmp_path_factory.mktemp("verified") / "run")
    write_evidence(run)
    computed_on = {"device": "cpu", "backend": "transformers", "dtype": "float32"}
    run.write_record(BY_NAME["05_export"], state="running", computed_on=computed_on)
    folders = {"adapter": copy_adapter(run), "merged": merge_adapter(run, run.file("export/merged"))}
    write_reference(run)
    figures = verify_exports(run, folders)
    folders["gguf"] = run.file("export/gguf")  # what llama.cpp would write: here only its digests are looked at
    for name in ("model-f16.gguf", "model-q4_k_m.gguf", "adapter-f32.gguf", "Modelfile"):
        write_text(folders["gguf"] / name, f"GGUF {name}")
    write_cards(run, folders, figures)
    write_record(run, folders, figures)
    return run


@pytest.fixture
def copied(exported, tmp_path):
    return open_run("auto", shutil.copytree(exported.path, tmp_path / "run"))


def folders_of(run):
    return {kind: folder for kind, folder in export_folders(run).items() if kind != "gguf"}


def change_a_weight(path, by=0.01):
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += by
    save_file(tensors, path, metadata={"format": "pt"})


def test_adapter_and_merged_model_agree_with_the_model_in_memory(exported):
    agreement = json.loads(exported.file("export/verify.json").read_text())["agreement"]
    for kind in ("adapter", "merged"):
        assert agreement[kind]["level"] == "exact" and agreement[kind]["identical"] == agreement[kind]["prompts"] == 4
        assert agreement[kind]["largest_logit_difference"] < 1e-4
    assert export_folders(exported) == {kind: exported.file(f"export/{kind}") for kind in ("adapter", "merged", "gguf")}


def test_a_float32_run_on_a_bfloat16_base_holds_the_merged_model_to_what_it_is_stored_in(tiny_folder, tmp_path):
    """SmolLM2 on a CPU: "the same tokens for 7 of 8 prompts, expected all", though the merge was right."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    weights = {name: (4 * tensor).bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run = make_run(base, tmp_path / "run", hardware__dtype="float32")
    run.write_record(BY_NAME["05_export"], state="running", computed_on=resolve_hardware(run.config.hardware))
    folders = {"adapter": copy_adapter(run), "merged": merge_adapter(run, run.file("export/merged"))}
    write_reference(run)
    figures = verify_exports(run, folders)
    assert figures["adapter"]["level"] == "exact" and figures["merged"]["level"] == "rounded to bfloat16"
    assert figures["merged"]["largest_logit_difference"] > 1e-4


def test_a_weight_that_changed_is_found_by_loading_even_where_no_digest_is_asked(copied):
    change_a_weight(copied.file("export/merged/model.safetensors"), 1.0)
    with pytest.raises(ModelError, match=r"exported merged, loaded back, gives .*(logits differ|the same tokens)"):
        verify_exports(copied, folders_of(copied))


def test_an_export_that_cannot_be_loaded_ends_in_a_sentence(copied):
    copied.file("export/adapter/adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"could not be loaded afresh \([\w.]+Error: "):
        verify_exports(copied, {"adapter": copied.file("export/adapter")})


def test_on_another_machine_float32_is_held_to_the_wider_tolerance(copied):
    elsewhere = {"device": "cuda", "backend": "unsloth", "dtype": "float16"}
    copied.write_record(BY_NAME["05_export"], state="done", computed_on=elsewhere)
    adapter = {"adapter": copied.file("export/adapter")}
    assert choose_tolerances(copied, adapter) == {"adapter": "float16"}
    coarse = copied.config.hardware.model_copy(update={"dtype": "bfloat16"})
    copied.config = copied.config.model_copy(update={"hardware": coarse})
    assert choose_tolerances(copied, adapter) == {"adapter": "bfloat16"}


def test_a_four_bit_run_holds_its_merged_model_to_the_tolerance_of_four_bit(copied):
    section = copied.config.model.model_copy(update={"load_in_4bit": True})
    copied.config = copied.config.model_copy(update={"model": section})
    assert choose_tolerances(copied, folders_of(copied)) == {"adapter": "exact", "merged": "4-bit"}


def test_an_export_that_lay_in_scratch_and_is_gone_is_no_fault_of_the_rest(copied, tmp_path):
    elsewhere = shutil.move(copied.file("export/merged"), tmp_path / "merged")
    folders = {"adapter": copied.file("export/adapter"), "merged": tmp_path / "merged"}
    write_record(copied, folders, {})
    assert export_folders(copied)["merged"] == elsewhere
    shutil.rmtree(elsewhere)
    assert set(export_folders(copied)) == {"adapter", "gguf"}


def test_the_reference_says_what_the_trained_model_says(exported):
    reference = Continuations.load(exported.file(REFERENCE))
    assert len(reference.tokens) == 4 and torch.isfinite(reference.logits).all()


def test_a_record_that_cannot_be_read_is_a_sentence(copied):
    copied.file("export/verify.json").write_text("{")
    with pytest.raises(RunDirError, match=r"verify\.json cannot be read .*run 05 again"):
        export_folders(copied)


def test_a_stage_that_is_killed_leaves_no_load_back_process_behind(exported):
    """It held a second model in memory, 16 GB for 8B, until somebody looked."""
    adapter = exported.file("export/adapter")
    code = f"""
from pathlib import Path
from utils.export import verify
from utils.pipeline.run_dir import open_run
run = open_run("auto", {str(exported.path)!r})
folders = {{"adapter": Path({str(adapter)!r})}}
verify.answer_elsewhere(run.config, folders, verify.export_prompts(run) * 9999, run.file(verify.REFERENCE))
"""
    parent = psutil.Popen([sys.executable, "-c", code], cwd=ROOT)
    started = time.monotonic()
    while not (children := parent.children(recursive=True)) and time.monotonic() < started + 120:
        time.sleep(0.05)
    time.sleep(1)
    children = parent.children(recursive=True) or children
    parent.kill()
    parent.wait()
    left = psutil.wait_procs(children, timeout=10)[1]
    for process in left:
        process.kill()
    assert children and left == []
