"""Checkpoints: only a whole one is resumed, and a damaged one is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.training.checkpoints import LIST, SealCallback, find_checkpoint

FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")


def save(folder: Path, step: int) -> Path:
    """A checkpoint as the Trainer and the callback leave it."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_bytes(f"{name} {step}".encode())
    arguments, state = SimpleNamespace(output_dir=folder), SimpleNamespace(global_step=step, is_world_process_zero=True)
    SealCallback().on_save(arguments, state, None)
    return checkpoint


def test_the_last_whole_checkpoint_is_resumed_and_an_unfinished_one_told(tmp_path, capsys):
    save(tmp_path, 9)
    last = save(tmp_path, 12)
    (tmp_path / "checkpoint-15").mkdir()  # a process died over it
    (tmp_path / "checkpoint-15" / "trainer_state.json").write_text("{}")
    capsys.readouterr()
    assert find_checkpoint(tmp_path) == str(last)
    assert capsys.readouterr().out == (
        "checkpoint-15 has no list of its files: it was not finished, and is passed over.\n"
    )
    assert find_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("name", [*FILES, LIST])
@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "delete", "swap"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_resumed(tmp_path, name, damage, capsys):
    before, last, other = save(tmp_path / "run", 3), save(tmp_path / "run", 6), save(tmp_path / "other", 6)
    (other / "optimizer.pt").write_bytes(b"another run's")
    SealCallback().on_save(
        SimpleNamespace(output_dir=other.parent), SimpleNamespace(global_step=6, is_world_process_zero=True), None
    )
    file, data = last / name, (last / name).read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        flipped = bytes([data[len(data) // 2] ^ 1])
        changed = {"truncate": data[:-2], "empty": b"", "flip": data[: len(data) // 2] + flipped + data[len(data) // 2 + 1 :],
                   "swap": (other / LIST).read_bytes()}  # fmt: skip
        file.write_bytes(changed[damage])
    assert find_checkpoint(tmp_path / "run") == str(before)
    why = "has no list of its files" if (name, damage) == (LIST, "delete") else "is damaged"
    assert f"checkpoint-6 {why}" in capsys.readouterr().out


def test_a_whole_checkpoint_of_another_run_is_not_resumed(tmp_path):
    save(tmp_path / "run", 3)
    shutil.copytree(save(tmp_path / "other", 6), tmp_path / "run" / "checkpoint-6")
    assert find_checkpoint(tmp_path / "run").endswith("checkpoint-3")
