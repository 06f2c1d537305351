"""A card says what the run's files say, in a form that the Hub reads, and a reader of the card alone can run the model."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.exported import make_run, result, write_evidence
from utils.config import load_config
from utils.export.adapter import copy_adapter, merge_adapter
from utils.export.model_card import make_card, write_cards
from utils.files import write_json


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    run = make_run(tiny_folder, tmp_path_factory.mktemp("card") / "run")
    write_evidence(run)
    folders = {"adapter": copy_adapter(run), "merged": merge_adapter(run, run.file("export/merged"))}
    adapter = {"level": "rounded to float16", "prompts": 4, "identical": 3}
    figures = {"adapter": adapter | {"largest_logit_difference": 2.5e-5}}
    write_cards(run, folders, figures)
    return run


@pytest.fixture
def hub_run(tiny_folder, tmp_path):
    """A run whose settings are those of the profile t4: model and data from the Hub."""
    run = make_run(tiny_folder, tmp_path / "run")
    write_evidence(run)
    hub = {"evaluate.more_benchmarks": [{"name": "qiaojin/PubMedQA", "split": "train"}], "model.revision": "a" * 40}
    hub["export.base_revision"] = "a" * 40  # of the 16-bit sibling
    run.config = load_config("t4", hub | {"evaluate.benchmark.revision": "e" * 40, "prompt.style": "native"})
    lora = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    write_json(run.file("export/adapter/adapter_config.json"), lora)
    return run


def card_of(run, kind="adapter") -> ModelCard:
    return make_card(run, kind, {"adapter": run.path, "merged": run.path}, {})


def test_the_metadata_is_yaml_that_the_hubs_classes_read_back(hub_run):
    card = ModelCard(str(card_of(hub_run)))
    assert card.data.base_model == "unsloth/DeepSeek-R1-Distill-Llama-8B" and card.data.license == "other"
    assert card.data.license_name == "mit-and-llama-3.1-community" and card.data.license_link.startswith("https://")
    assert card.data.datasets == ["FreedomIntelligence/medical-o1-reasoning-SFT"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    header = yaml.safe_load(str(card).split("---\n")[1])
    assert set(header) == {
        "base_model", "base_model_relation", "datasets", "language", "library_name", "license", "license_name",
        "license_link", "pipeline_tag", "tags",
    }  # fmt: skip
    assert header["base_model_relation"] == "adapter"
    assert yaml.safe_load(str(card_of(hub_run, "merged")).split("---\n")[1])["base_model_relation"] == "finetune"


def test_only_the_adapter_was_measured_and_the_other_cards_say_so(hub_run):
    merged = {"level": "rounded to float16", "prompts": 50, "identical": 48}
    gguf = {"level": "margin 0.5", "prompts": 20, "identical": 19}
    hub_run.file("model-f16.gguf").write_bytes(b"GGUF")
    figures = {"merged": merged, "gguf_f16": gguf}
    folders = dict.fromkeys(("adapter", "merged", "gguf"), hub_run.path)
    cards = {kind: make_card(hub_run, kind, folders, figures) for kind in folders}
    assert "not measured again" not in str(cards["adapter"])
    for kind, prompts in (("merged", 50), ("gguf", 20)):
        body = str(cards[kind])
        assert "measured with the adapter on the base in 4-bit NF4;" in body
        assert f"here were held against the model in memory on {prompts} prompts, not measured again." in body
    assert "neither measured again nor held against it" in str(make_card(hub_run, "gguf", folders, {}))


def test_the_table_of_checks_says_how_far_each_agrees_and_what_was_not_loaded(hub_run):
    for name in ("model-f16.gguf", "model-q8_0.gguf", "adapter-f32.gguf"):
        hub_run.file(name).write_bytes(b"GGUF")
    merged = {"level": "rounded to float16", "prompts": 50, "identical": 48}
    q8_0 = {"level": "margin 1.0", "prompts": 20, "identical": 19}
    figures = {
        "merged": merged | {"largest_logit_difference": 0.25},
        "gguf_f16": {"loaded": "no: llama-server was not found"},
        "gguf_q8_0": q8_0,
    }
    folders = dict.fromkeys(("adapter", "merged", "gguf"), hub_run.path)
    body = str(make_card(hub_run, "gguf", folders, figures))
    assert "| merged | rounded to float16 | 50 | 48 | 2.5e-01 |" in body
    assert "| gguf q8 0 | margin 1.0 | 20 | 19 | not asked |" in body
    assert "Not loaded: `model-f16.gguf` (llama-server was not found), `adapter-f32.gguf` (no check opens it)." in body
    assert "Each file was loaded back" not in body and "held against the model in memory:" in body
    for name in ("exact", "rounded", "margin", "reported"):
        assert f"`{name}`" in body


def test_a_run_that_came_out_worse_says_so_and_nothing_better(hub_run):
    text = str(card_of(hub_run))
    body = text.split("---\n", 2)[2]
    metrics = json.loads(hub_run.file("comparison/metrics.json").read_text())
    assert body.count(metrics["sentence"]) == 2  # under the title, and as its claim
    assert "**worse**" in body and not re.search(r"\bbetter\b|more accurate|improve|state.of.the.art", body, re.I)


def test_a_figure_that_changes_in_metrics_json_changes_in_the_card(hub_run):
    before = str(card_of(hub_run))
    assert (
        "| multiple-choice accuracy, strict (primary) | 200 | 0.550 | 0.480 | -0.070 | -0.120 to -0.020 | 0.010 |"
        in before
    )
    better = result("multiple_choice", 0.5, 0.61, 0.04, 0.18, label="multiple-choice accuracy, strict", p_value=1e-5)
    write_evidence(hub_run, "better", primary=better)
    after = str(card_of(hub_run))
    assert "| 0.500 | 0.610 | +0.110 | +0.040 to +0.180 | < 0.001 |" in after and "0.550" not in after


def test_the_body_tells_recipe_data_split_truncation_contamination_limits_and_licences(hub_run):
    body = str(card_of(hub_run)).split("---\n", 2)[2]
    for fact in (
        "a" * 40, "f" * 40, "a" * 16, "b" * 16, "r 16, alpha 16", "60 steps", "Tesla T4", "2640 s of training",
        "9.1 GiB of GPU memory", "answers cut off at the limit | 200 | 0.250 | 0.125", "near benchmark 7",
        "exact duplicates 3", "not measured", "unsloth 2026.10.7", "No medical advice", "GPT-4o", "licensing examinations",
        "MIT (DeepSeek)", "Llama 3.1", "Apache-2.0", "2501.12948", "2412.18925", "2106.09685", "2 dropped",
    ):  # fmt: skip
        assert fact in body, fact
    assert "largest group" not in body  # was not looked for: no number is made up
    assert "trl None" not in body


def test_the_recipe_is_told_as_it_was_trained_and_not_as_it_was_configured(hub_run):
    """A reader may have edited notebook 03's cells."""
    write_json(
        hub_run.file("export/adapter/adapter_config.json"),
        {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ".*up_proj"},
    )
    manifest = hub_run.manifest()
    manifest["stages"]["03_lora_training"]["figures"] |= {"learning_rate": 0.003, "optim": "sgd"}
    write_json(hub_run.manifest_path, manifest)
    card = str(card_of(hub_run))
    assert "| r 4, alpha 8, dropout 0.1, on .*up_proj |" in card and "sgd, learning rate 0.003, cosine" in card


def test_tables_are_tables_and_no_template_syntax_is_left(exported):
    for kind in ("adapter", "merged"):
        text = exported.file(f"export/{kind}/README.md").read_text()
        assert "{{" not in text and "{%" not in text and "\n\n\n" not in text
        tables = re.findall(r"(?:^\|.*\n)+", text.split("---\n", 2)[2], re.M)
        assert len(tables) == 3
        for table in tables:
            assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert "| adapter | rounded to float16 | 4 | 3 | 2.5e-05 |" in text


def test_a_card_of_your_own_model_and_rows_claims_no_licence_that_is_not_ours(exported):
    text = exported.file("export/merged/README.md").read_text()
    assert "the licence of tiny applies" in text and "Llama 3.1" not in text and "GPT-4o" not in text
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license_name"] == "as-the-base-model" and "license_link" not in header  # no such file is written
    assert ModelCard(text).data.base_model is None  # a folder here is no id there


def test_the_prompt_is_written_out_as_it_was_trained(hub_run, exported):
    assert "<｜User｜>QUESTION<｜Assistant｜><think>\n```\n\nwith a line break at its end." in str(card_of(hub_run))
    section = hub_run.config.prompt.model_copy(update={"style": "tutorial"})
    hub_run.config = hub_run.config.model_copy(update={"prompt": section})
    text = str(card_of(hub_run))
    assert "### Question:\nQUESTION\n\n### Response:\n<think>\n```" in text and "with a line break" not in text


def test_the_cards_own_python_lines_run_in_their_folders(exported, tiny_folder):
    code = "import os\n"
    for kind in ("adapter", "merged"):
        folder = exported.file(f"export/{kind}")
        (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
        lines = lines.replace('base_id = "tiny"', f"base_id = {str(tiny_folder)!r}")  # the reader's own folder
        code += f"os.chdir({str(folder)!r})\n{lines}\nassert output.shape[1] > inputs['input_ids'].shape[1]\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_way_to_run_it_is_as_it_was_measured_and_names_the_commit(hub_run):
    for name in ("model-f16.gguf", "model-q4_k_m.gguf"):
        hub_run.file(name).write_bytes(b"GGUF")
    folders = dict.fromkeys(("adapter", "merged", "gguf"), hub_run.path)
    adapter, merged, gguf = (str(make_card(hub_run, kind, folders, {})) for kind in folders)
    generate = hub_run.config.generate
    sampled = f"temperature={generate.temperature}, top_p={generate.top_p}"
    for card in (adapter, merged):
        (lines,) = re.findall(r"```python\n(.*?)```", card, re.S)
        compile(lines, "card", "exec")
        assert sampled in lines and ("a" * 40 in lines) == (card is adapter)
        body = json.loads(re.search(r"-d '(.*)'", card)[1])
        assert (body["temperature"], body["max_tokens"]) == (generate.temperature, generate.max_new_tokens)
        assert ("--enable-lora --max-lora-rank 16" in card) == (card is adapter)
    assert f"--revision {'a' * 40}" in adapter
    assert "llama-completion -m model-q4_k_m.gguf -no-cnv" in gguf and "<｜Assistant｜><think>\\n'" in gguf
