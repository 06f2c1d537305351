"""Around the trainer: what it trains on is what notebook 02 showed, and a killed run ends where an undisturbed one does."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from utils.data import synthetic as demo_data
from utils.data.prompts import format_row
from utils.errors import TrainingError
from utils.evaluation.loss import tokenize_row
from utils.training.checkpoints import SealCallback, find_checkpoint
from utils.training.train import check_loss_mask, save_adapter, training_log

ROWS = demo_data.tuning_rows("train", 12)


def make_trainer(tiny_model, folder, style="native", loss_on="completion", **arguments) -> SFTTrainer:
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(tiny_model[0]), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    pairs = [dict(zip(("prompt", "completion"), format_row(row, style), strict=True)) for row in ROWS]
    defaults = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "optim": "adamw_torch"}
    settings = SFTConfig(
        output_dir=str(folder),
        max_length=arguments.pop("max_length", 512),
        completion_only_loss=loss_on == "completion",
        per_device_train_batch_size=2,
        seed=7,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        **{**defaults, **arguments},
    )
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=copy.deepcopy(tiny_model[1]),
    )


@pytest.mark.parametrize("style", ["native", "tutorial"])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_trl_sees_the_tokens_and_the_mask_that_notebook_02_shows(tiny_model, tmp_path, style, loss_on):
    trainer = make_trainer(tiny_model, tmp_path, style, loss_on)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    tokenizer = tiny_model[1]
    for i, row in enumerate(ROWS):
        expected = tokenize_row(tokenizer, *format_row(row, style))
        ids, length = batch["input_ids"][i].tolist(), len(expected["input_ids"])
        assert ids[:length] == expected["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids.count(tokenizer.eos_token_id) == 1
        counted = [label != -100 for label in batch["labels"][i].tolist()]
        wanted = [part > 0 or loss_on == "all" for part in expected["part"]]
        assert counted[:length] == wanted and not any(counted[length:])


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_trainer_that_counts_other_tokens_than_notebook_02_is_refused(tiny_model, tmp_path, loss_on):
    parts = [tokenize_row(tiny_model[1], *format_row(row, "native"))["part"] for row in ROWS]
    formatted = pd.DataFrame(
        {"tokens": [len(p) for p in parts], "counted": [sum(c > 0 or loss_on == "all" for c in p) for p in parts]}
    )
    assert "exactly those of 02" in check_loss_mask(
        make_trainer(tiny_model, tmp_path, loss_on=loss_on).train_dataset, formatted
    )
    other = "all" if loss_on == "completion" else "completion"
    with pytest.raises(TrainingError, match="in the loss; 02 formatted"):
        check_loss_mask(make_trainer(tiny_model, tmp_path, loss_on=other).train_dataset, formatted)
    with pytest.raises(TrainingError, match="in the loss; 02 formatted"):  # rows that were cut
        check_loss_mask(make_trainer(tiny_model, tmp_path, loss_on=loss_on, max_length=20).train_dataset, formatted)


def test_a_run_resumed_from_its_checkpoint_ends_with_the_same_weights(tiny_model, tmp_path):
    whole = make_trainer(tiny_model, tmp_path / "whole")
    whole.train()
    torn = make_trainer(tiny_model, tmp_path / "torn")
    torn.add_callback(SealCallback())

    class Killed(Exception):
        pass

    step = torn.training_step

    def killed_after_four(*arguments, **keywords):
        if torn.state.global_step == 4:
            raise Killed
        return step(*arguments, **keywords)

    torn.training_step = killed_after_four
    with pytest.raises(Killed):
        torn.train()
    resumed = make_trainer(tiny_model, tmp_path / "torn")
    checkpoint = find_checkpoint(tmp_path / "torn")
    assert checkpoint.endswith("checkpoint-3")
    resumed.train(resume_from_checkpoint=checkpoint)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert list(training_log(resumed)["step"]) == [1, 2, 3, 4, 5, 6]
    assert training_log(resumed)["loss"].equals(training_log(whole)["loss"])


def test_an_adapters_file_names_its_modules_in_one_order(tiny_model, tmp_path):
    """peft writes them as a set gives them, in the order of a process's hashes, and 04 keeps its answers by the digest."""
    model = get_peft_model(
        copy.deepcopy(tiny_model[0]), LoraConfig(r=4, target_modules=["q_proj", "down_proj", "k_proj"])
    )
    run = SimpleNamespace(file=lambda name: tmp_path / name)
    (tmp_path / "training").mkdir()
    for order in (["q_proj", "down_proj", "k_proj"], ["k_proj", "q_proj", "down_proj"]):
        model.peft_config["default"].target_modules = order
        save_adapter(model, tiny_model[1], run, pd.DataFrame({"step": [1]}))
        settings = json.loads((tmp_path / "training/adapter/adapter_config.json").read_text(encoding="utf-8"))
        assert settings["target_modules"] == ["down_proj", "k_proj", "q_proj"]
