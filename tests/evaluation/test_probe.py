"""The letter probe: the harness's likelihoods are those of a forward pass by hand, and it leaves everything as it was."""

from __future__ import annotations

import copy
import os
import random
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from utils.data.rows import read_table
from utils.errors import DataError, ModelError, PinError
from utils.evaluation import probe
from utils.evaluation.probe import probe_letters
from utils.evaluation.probe_results import current_probe, format_probe
from utils.files import write_text
from utils.project import ROOT
from utils.sealed import read_lines

TEXTS = ["Aspirin", "A rash, 医🩺", "Rest", "{{ none }}", "Surgery", "Water", "Salt", "Iron", "Sleep", "Heat"]


def item(number: int, options: int, gold: str, question: str = "") -> dict:
    texts = {"ABCDEFGHIJ"[i]: f"{TEXTS[(i + number) % 10]}" for i in range(options)}
    question = question or f"A man has {'a dry cough and ' * number}a red rash. What helps?"
    return {"id": f"m{number}", "question": question, "options": texts, "gold": gold}


@pytest.fixture
def items() -> pd.DataFrame:
    """Three to ten options, and two items that differ in nothing but their id and right letter."""
    twins = [{**item(3, 5, gold), "id": name} for name, gold in (("twin-1", "B"), ("twin-2", "E"))]
    return pd.DataFrame([item(0, 3, "A"), *twins, item(1, 4, "D"), item(2, 5, "C"), item(5, 10, "J"), item(9, 4, "A")])


def by_hand(model, tokenizer, row) -> dict[str, float]:
    """log p(" letter" | BOS + prompt): one unpadded forward pass for each letter, the letter's tokens summed."""
    prompt = format_probe(row.question, row.options)
    start, sums = len(tokenizer(prompt)["input_ids"]), {}
    for letter in row.options:
        ids = tokenizer(f"{prompt} {letter}")["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
        sums[letter] = sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids)))
    return sums


def forbid_computing(monkeypatch) -> None:
    monkeypatch.setattr(probe, "_score", lambda *_: pytest.fail("was computed again"))


def test_likelihoods_letters_and_accuracy_are_those_of_a_forward_pass_by_hand(tiny_model, items, tmp_path):
    frame = probe_letters(*tiny_model, items, tmp_path / "probe.jsonl", "arm")
    assert list(frame["id"]) == list(items["id"])
    for row, found in zip(items.itertuples(), frame.itertuples(), strict=True):
        expected = by_hand(*tiny_model, row)
        assert found.loglikelihoods == pytest.approx(expected, abs=1e-4)
        assert list(found.loglikelihoods) == list(row.options)
        assert found.letter == max(expected, key=expected.get)


def test_an_item_is_correct_where_its_likeliest_letter_is_the_right_one(tiny_model, items, tmp_path):
    expected = []
    for i, row in enumerate(items.itertuples()):
        likelihoods = by_hand(*tiny_model, row)
        ranked = sorted(likelihoods, key=likelihoods.get, reverse=True)
        items.at[row.Index, "gold"] = ranked[i % 3]
        expected.append(i % 3 == 0)
    frame = probe_letters(*tiny_model, items, tmp_path / "probe.jsonl", "arm")
    assert frame["correct"].tolist() == expected and frame["correct"].mean() == pytest.approx(3 / 7)


def test_half_precision_does_not_round_the_likelihoods(tiny_model, items, tmp_path):
    model = copy.deepcopy(tiny_model[0]).bfloat16()
    frame = probe_letters(model, tiny_model[1], items, tmp_path / "probe.jsonl", "arm")
    nats = torch.tensor([value for row in frame["loglikelihoods"] for value in row.values()])
    assert (nats != nats.bfloat16().float()).all()


def test_the_prompt_is_that_of_the_harness_s_own_medqa(items):
    from lm_eval.tasks.medqa import preprocess_medqa

    row = items[items["id"] == "m1"].iloc[0]
    theirs = {"sent1": row.question, **{f"ending{i}": text for i, text in enumerate(row.options.values())}}
    assert format_probe(row.question, row.options) == preprocess_medqa.doc_to_text(theirs)


def test_the_file_holds_what_is_returned_an_object_for_each_item(tiny_model, items, tmp_path):
    path = tmp_path / "new folder" / "probe.jsonl"
    frame = probe_letters(*tiny_model, items, path, "arm")
    lines = read_lines(path)
    assert lines == frame.to_dict("records")
    assert list(lines[0]) == ["id", "key", "letter", "correct", "loglikelihoods"]
    assert [file.name for file in path.parent.iterdir()] == ["probe.jsonl"]
    pd.testing.assert_frame_equal(current_probe(path, items, "arm"), frame)


def test_a_complete_file_is_read_and_nothing_is_computed(tiny_model, items, tmp_path, monkeypatch):
    path = tmp_path / "probe.jsonl"
    first = probe_letters(*tiny_model, items, path, "arm")
    written = path.stat().st_mtime_ns
    forbid_computing(monkeypatch)
    monkeypatch.setattr(probe, "require_lm_eval", lambda: pytest.fail("asked for lm_eval"))
    pd.testing.assert_frame_equal(probe_letters(None, None, items, path, "arm"), first)
    fewer = items.iloc[[4, 0]]
    assert list(probe_letters(None, None, fewer, path, "arm")["id"]) == ["m2", "m0"]
    assert path.stat().st_mtime_ns == written


def test_items_that_were_frozen_on_file_are_the_same_items(tiny_model, items, tmp_path, monkeypatch):
    first = probe_letters(*tiny_model, items, tmp_path / "probe.jsonl", "arm")
    write_text(tmp_path / "items.jsonl", items.to_json(orient="records", lines=True, force_ascii=False))
    forbid_computing(monkeypatch)
    again = probe_letters(*tiny_model, read_table(tmp_path / "items.jsonl"), tmp_path / "probe.jsonl", "arm")
    pd.testing.assert_frame_equal(again, first)


@pytest.mark.parametrize(
    "change", ["another arm", "another question", "another option", "another right letter", "one more item", "torn"]
)
def test_figures_of_another_arm_or_other_items_are_not_reused(tiny_model, items, tmp_path, monkeypatch, change):
    path, arm = tmp_path / "probe.jsonl", "adapter one"
    few = items.head(2).copy()
    probe_letters(*tiny_model, few, path, arm)
    if change == "another arm":
        arm = "adapter two"
    elif change == "another question":
        few["question"] = few["question"] + "?"
    elif change == "another option":
        few["options"] = [{**options, "A": "Else"} for options in few["options"]]
    elif change == "another right letter":
        few["gold"] = "C"
    elif change == "one more item":
        few = items.head(3)
    else:
        path.write_bytes(path.read_bytes()[:-30])
    assert current_probe(path, few, arm) is None
    computed, real = [], probe._score
    monkeypatch.setattr(probe, "_score", lambda *a: computed.append(1) or real(*a))
    again = probe_letters(*tiny_model, few, path, arm)
    assert computed == [1] and current_probe(path, few, arm).equals(again)


def test_a_wrapped_model_with_its_adapter_off_gives_the_base_s_figures(tiny_folder, items, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from utils.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_folder)
    model = LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    base = probe_letters(model, tokenizer, items, tmp_path / "base.jsonl", "base")
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    wrapped = get_peft_model(model, config).eval()
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    tuned = probe_letters(wrapped, tokenizer, items, tmp_path / "tuned.jsonl", "tuned")
    with wrapped.disable_adapter():
        off = probe_letters(wrapped, tokenizer, items, tmp_path / "off.jsonl", "off")
    for row, adapted, plain, bare in zip(
        items.itertuples(), tuned.itertuples(), base.itertuples(), off.itertuples(), strict=True
    ):
        assert bare.loglikelihoods == plain.loglikelihoods
        assert adapted.loglikelihoods == pytest.approx(by_hand(wrapped, tokenizer, row), abs=1e-4)
        assert adapted.loglikelihoods != pytest.approx(plain.loglikelihoods, abs=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())
    assert not wrapped.training and wrapped.active_adapters == ["default"]


def test_model_tokenizer_random_state_and_folder_stay_as_they_were(tiny_model, items, tmp_path, monkeypatch, capfd):
    model, tokenizer = tiny_model
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    monkeypatch.setattr(type(model), "to", lambda *_, **__: pytest.fail("a 4-bit model cannot be moved"))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ))
    pad = tokenizer.pad_token_id
    probe_letters(model, tokenizer, items, tmp_path / "probe.jsonl", "arm")
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ))
    assert after == before
    assert (tokenizer.padding_side, tokenizer.pad_token_id, model.training) == ("left", pad, False)
    assert [file.name for file in tmp_path.iterdir()] == ["probe.jsonl"]
    out, err = capfd.readouterr()
    assert err == "" and "loglikelihood" not in out
    assert "probing letters: 100%" in out and "7/7" in out


def test_nothing_reaches_for_the_network(tiny_model, items, tmp_path, monkeypatch):
    def refuse(_, address):
        pytest.fail(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **_: pytest.fail(f"looks up {a}"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asks the Hub"))
    probe_letters(*tiny_model, items, tmp_path / "probe.jsonl", "arm")


def test_the_import_of_the_harness_leaves_no_variable_behind():
    code = (
        "import os; before = dict(os.environ)\n"
        "from utils.evaluation.probe import _same_environment\n"
        "with _same_environment():\n    import lm_eval\n    assert dict(os.environ) != before\n"
        "assert dict(os.environ) == before"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_harness_is_a_sentence_that_says_what_to_install(tiny_model, items, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PinError, match=r"lm_eval is not installed; expected .*pip install lm_eval==0\.4\.13, or leave"):
        probe_letters(*tiny_model, items, tmp_path / "probe.jsonl", "arm")
    assert not (tmp_path / "probe.jsonl").exists()


def test_the_named_version_is_the_one_that_the_tests_run_on():
    assert probe.LM_EVAL in (ROOT / "requirements-cpu.txt").read_text().splitlines()


def test_an_item_beyond_the_model_s_context_is_a_sentence_and_not_cut(tiny_model, items, tmp_path):
    long = pd.DataFrame([item(0, 4, "A"), item(1, 4, "B", question="cough " * 5000)])
    with pytest.raises(DataError, match=r"Item m1 is \d+ tokens long, the model takes 4096; take it out"):
        probe_letters(*tiny_model, long, tmp_path / "probe.jsonl", "arm")


def test_a_likelihood_that_is_not_finite_is_a_sentence_and_nothing_is_written(tiny_model, items, tmp_path, monkeypatch):
    scores = [dict.fromkeys(options, float("nan")) for options in items["options"]]
    monkeypatch.setattr(probe, "_score", lambda *_: scores)
    with pytest.raises(ModelError, match=r"Item m0: a letter's log-likelihood is \[nan, nan, nan\], expected finite"):
        probe_letters(*tiny_model, items, tmp_path / "probe.jsonl", "arm")
    assert not (tmp_path / "probe.jsonl").exists()


def test_the_figures_on_file_are_read_without_torch_and_without_the_harness(tiny_model, items, tmp_path):
    path = tmp_path / "probe.jsonl"
    probe_letters(*tiny_model, items, path, "arm")
    code = (
        "import sys\nfrom pathlib import Path\nfrom utils.sealed import read_lines\nimport utils.evaluation.probe_results\n"
        "print(len(read_lines(Path(sys.argv[1]))), {'torch', 'lm_eval', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "7 set()\n", done.stderr
