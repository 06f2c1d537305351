"""Around the trainer: what it trains on is what notebook 02 showed, and a killed run ends where an undisturbed one does."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from benchmarks.recipe import notebook_functions, notebook_source
from tests.conftest import import_file
from utils.data import synthetic as demo_data
from utils.data.prompts import format_row
from utils.errors import SessionOver, TrainingError
from utils.evaluation.loss import tokenize_row
from utils.training import train_adapter
from utils.training.launch import SUMMARY
from utils.training.train import check_loss_mask, checkpoint_dir, find_checkpoint, save_adapter, training_log

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


def save(folder: Path, step: int, names=("rng_state.pth",)) -> Path:
    """A checkpoint as the trainer leaves it, as far as `find_checkpoint` looks."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in names:
        torch.save({"python": 1}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


@pytest.mark.parametrize("text", [None, "", '{"global_step": 12, "log'])
def test_the_last_checkpoint_that_was_finished_is_resumed_and_another_named(tmp_path, capsys, text):
    last, torn = save(tmp_path, 9), save(tmp_path, 12)  # as text, "12" comes before "9"
    assert find_checkpoint(tmp_path) == str(torn) and capsys.readouterr().out == ""
    if text is None:
        (torn / "trainer_state.json").unlink()
    else:
        (torn / "trainer_state.json").write_text(text)
    assert find_checkpoint(tmp_path) == str(last)
    assert capsys.readouterr().out == "checkpoint-12 was not finished, and is passed over.\n"
    assert find_checkpoint(tmp_path / "absent") is None


def test_a_checkpoint_counts_once_every_process_has_left_its_random_state(tmp_path, monkeypatch):
    first, second = (f"rng_state_{rank}.pth" for rank in (0, 1))
    whole, torn = save(tmp_path, 3, (first, second)), save(tmp_path, 6, (first,))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_checkpoint(tmp_path) == str(whole)
    (torn / second).write_bytes((whole / second).read_bytes()[:-30])  # the process died while it wrote
    assert find_checkpoint(tmp_path) == str(whole)
    shutil.copy(whole / second, torn / second)
    assert find_checkpoint(tmp_path) == str(torn)
    assert find_checkpoint(save(tmp_path / "of-one", 3).parent).endswith("checkpoint-3")  # saved by a single process
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert find_checkpoint(tmp_path) == str(torn)


def out_of_memory_once(make_trainer, update: int):
    """`make_trainer`, whose first trainer has no memory left in the update after `update`."""
    failed = []

    def make(*arguments):
        trainer = make_trainer(*arguments)
        real = trainer.training_step

        def training_step(*given, **named):
            if trainer.state.global_step == update and not failed:
                failed.append(1)
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(*given, **named)

        trainer.training_step = training_step
        return trainer

    return make


def adapter(run) -> dict:
    return load_file(run.file("training/adapter/adapter_model.safetensors"))


def apart(one, other) -> float:
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(("save_steps", "where"), [(3, "checkpoint-6"), (100, "the start")])
def test_out_of_memory_resumes_from_the_last_checkpoint_with_a_smaller_plan(training_run, capsys, save_steps, where):
    load_with_lora, make_trainer = notebook_functions()
    run, undisturbed = (training_run(name, train__save_steps=save_steps) for name in ("run", "undisturbed"))
    summary = train_adapter(run, load_with_lora, out_of_memory_once(make_trainer, 7))
    shown = capsys.readouterr().out
    assert (
        f"Out of memory with micro-batch 4 x 1, 0 layers recompute; resuming from {where} with micro-batch 2 x 2"
        in shown
    )
    assert summary["figures"]["steps"] == 12 and summary["figures"]["per_device_train_batch_size"] == 2
    assert list(pd.read_csv(run.file("training/log.csv"))["step"]) == list(range(1, 13))
    train_adapter(undisturbed, load_with_lora, make_trainer)
    assert apart(run, undisturbed) < 1e-3


def test_sessions_that_end_in_time_lead_to_the_same_adapter_as_one_long_one(training_run):
    functions = notebook_functions()
    # A limit that is over as soon as it began: each session takes one update, the least that is any progress.
    parts = training_run("parts", hardware__max_hours=1e-6, train__max_steps=3)
    stops = []
    while True:
        try:
            train_adapter(parts, *functions)
            break
        except SessionOver as over:
            stops.append(int(re.search(r"stopped at step (\d+) of 3 with a checkpoint", str(over))[1]))
        assert list(pd.read_csv(parts.file("training/log.csv"))["step"]) == list(range(1, len(stops) + 1))
    assert stops == [1, 2]
    short = training_run("short", train__max_steps=3)
    train_adapter(short, *functions)
    assert apart(parts, short) == 0


def test_an_edited_recipe_is_trained_from_the_start_and_a_comment_in_it_is_no_edit(training_run, tmp_path):
    def functions(name: str, old: str = "", new: str = ""):
        path = tmp_path / f"{name}.py"
        path.write_text(notebook_source().replace(old, new), encoding="utf-8")
        cells = import_file(path)
        return cells.load_with_lora, cells.make_trainer

    rate = "learning_rate=config.train.learning_rate"
    edited = functions("edited", rate, "learning_rate=1e-5")
    run, fresh = training_run("run", train__max_steps=3), training_run("fresh", train__max_steps=3)
    train_adapter(run, *functions("plain"))
    train_adapter(run, *functions("said", rate, f"# as the profile has it\n        {rate}"))
    assert len(list(run.path.glob("training/checkpoints/*"))) == 1
    train_adapter(run, *edited)
    assert train_adapter(fresh, *edited)["figures"]["learning_rate"] == 1e-5  # which the card will say
    assert apart(run, fresh) == 0 and len(list(run.path.glob("training/checkpoints/*"))) == 2
    train_adapter(run, *functions("rank", "r=config.lora.r", "r=4"))  # its checkpoints fit no other rank's
    assert next(value for name, value in adapter(run).items() if "lora_A" in name).shape[0] == 4


VALIDATED = {"data__validation_rows": 5, "train__eval_steps": 2, "train__save_steps": 4}


def test_the_weights_with_the_lowest_validation_loss_are_kept_though_no_checkpoint_was_due_there(training_run):
    functions = notebook_functions()
    best, last = (training_run(keep, train__keep=keep, **VALIDATED) for keep in ("best", "last"))
    figures = train_adapter(best, *functions)["figures"]
    log = pd.read_csv(best.file("training/log.csv")).set_index("step")
    assert list(log["eval_loss"].dropna().index) == [2, 4, 6, 8, 10, 12]
    lowest = log["eval_loss"].idxmin()
    assert figures["kept_step"] == lowest < 12 and lowest % 4 == 2
    kept = load_file(checkpoint_dir(best) / f"checkpoint-{lowest}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], weights) for name, weights in adapter(best).items())
    assert train_adapter(last, *functions)["figures"]["kept_step"] == 12
    assert pd.read_csv(last.file("training/log.csv")).equals(log.reset_index()) and apart(best, last) > 0


def test_a_moved_run_resumed_after_each_update_stops_and_keeps_as_an_undisturbed_one(training_run):
    functions = notebook_functions()
    settings = VALIDATED | {"train__keep": "best", "train__early_stopping_patience": 1}
    whole, parts = training_run("whole", **settings), training_run("parts", hardware__max_hours=1e-6, **settings)
    figures, place = train_adapter(whole, *functions)["figures"], parts.path
    sessions = 0
    while not parts.file(SUMMARY).exists():
        with contextlib.suppress(SessionOver):
            train_adapter(parts, *functions)
        sessions += 1
        parts.path = place.rename(place.with_name(f"parts-{sessions}"))
        place = parts.path
    assert figures["steps"] == figures["kept_step"] + 2 < 12 and sessions == figures["steps"] + 1
    assert json.loads(parts.file(SUMMARY).read_text())["figures"]["kept_step"] == figures["kept_step"]
    logs = [pd.read_csv(run.file("training/log.csv")) for run in (whole, parts)]
    assert apart(whole, parts) == 0 and logs[0].equals(logs[1])


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


def test_a_run_killed_after_its_last_checkpoint_takes_no_further_update(training_run):
    """The trainer goes on where the last update is not at an epoch's end: 12 of 16 here."""
    functions, run = notebook_functions(), training_run()
    train_adapter(run, *functions)
    first = adapter(run)
    run.file(SUMMARY).unlink()
    assert train_adapter(run, *functions)["figures"]["steps"] == 12
    assert all(torch.equal(first[name], weights) for name, weights in adapter(run).items())
