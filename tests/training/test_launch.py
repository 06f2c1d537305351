"""Several processes: the same training as one, killed and resumed, out of memory, on two machines; sentences that arrive."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from safetensors.torch import load_file

from benchmarks.recipe import notebook_source
from tests.conftest import import_file
from utils.errors import ConfigError, HardwareError, Interrupted, SessionOver, TrainingError
from utils.project import python_path
from utils.training.checkpoints import LIST
from utils.training.launch import (
    SUMMARY,
    _ask_to_stop,
    processes_that_divide,
    read_recipe,
    same_weights,
    train,
    write_recipe,
)
from utils.training.train import checkpoint_dir


@pytest.fixture
def recipe(tmp_path):
    """Notebook 03's two functions as a module on disk, so that their source can be found as in a notebook."""
    path = tmp_path / "cells.py"
    path.write_text(notebook_source(), encoding="utf-8")
    module = import_file(path)
    return module.load_with_lora, module.make_trainer


def adapter(run) -> dict:
    return load_file(run.file("training/adapter/adapter_model.safetensors"))


def same(one, other) -> bool:
    a, b = adapter(one), adapter(other)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def close(one, other) -> bool:
    a, b = adapter(one), adapter(other)
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() < 1e-3 for name in a)


def killed_on_the_way(run, processes: int, seed: int) -> int:
    """Start the training by hand, kill -9 all of it at a random moment after the first checkpoint; which was the last."""
    command = [sys.executable, "-m", "utils.training.launch", str(run.path)]
    if processes > 1:
        launch = [
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
        ]
        launch += [
            "--num_machines",
            "1",
            "--main_process_port",
            "0",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
        command = [sys.executable, *launch, *command[1:]]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    folder = checkpoint_dir(run)
    while process.poll() is None and not list(folder.glob(f"checkpoint-*/{LIST}")):
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 1))
    started = psutil.Process(process.pid)
    for one in [started, *started.children(recursive=True)]:
        one.kill()
    process.wait()
    assert not run.file(SUMMARY).exists()  # it was not done yet
    return max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def test_a_killed_run_ends_with_the_same_weights_with_one_process_and_with_two(
    training_run, recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # where the slow recipe finds the notebook's
    slow = {"train__max_steps": 18}
    whole = training_run("whole", **slow)
    one = train(whole, *recipe)
    torn = training_run("torn", **slow)
    write_recipe(torn, slowed_down(tmp_path))
    assert 3 <= killed_on_the_way(torn, 1, seed=1) < 18
    train(torn, *recipe)
    assert same(whole, torn)
    pd.testing.assert_frame_equal(*(pd.read_csv(run.file("training/log.csv")) for run in (whole, torn)))

    whole_of_two = training_run("whole-of-two", hardware__processes=2, **slow)
    two = train(whole_of_two, *recipe)
    torn_of_two = training_run("torn-of-two", hardware__processes=2, **slow)
    write_recipe(torn_of_two, slowed_down(tmp_path))
    assert 3 <= killed_on_the_way(torn_of_two, 2, seed=2) < 18
    train(torn_of_two, *recipe)
    assert same(whole_of_two, torn_of_two)

    # The same rows in every update: what differs between one process and two is the order of sums.
    losses = [pd.read_csv(run.file("training/log.csv"))["loss"] for run in (whole, whole_of_two)]
    assert (losses[0] - losses[1]).abs().head(20).max() < 1e-3
    assert one["figures"]["processes"] == 1 and two["figures"]["processes"] == 2
    assert two["figures"]["same_on_all_processes"] is True and "same_on_all_processes" not in one["figures"]
    assert two["figures"]["per_device_train_batch_size"] * two["figures"]["gradient_accumulation_steps"] * 2 == 4


def slowed_down(tmp_path: Path):
    """The recipe with a sixth of a second more for each step, so that there is a middle in which to be killed."""
    source = """
def load_with_lora(config):
    from cells import load_with_lora

    return load_with_lora(config)


def make_trainer(*arguments):
    import time
    from cells import make_trainer

    trainer = make_trainer(*arguments)
    step = trainer.training_step
    trainer.training_step = lambda *given, **named: time.sleep(0.15) or step(*given, **named)
    return trainer
"""
    (tmp_path / "slow.py").write_text(source, encoding="utf-8")
    module = import_file(tmp_path / "slow.py")
    return module.load_with_lora, module.make_trainer


def out_of_memory_once(recipe, tmp_path: Path):
    """The recipe, whose first trainer has no memory left in its eighth update."""
    mark = tmp_path / "mark"
    source = f"""
def load_with_lora(config):
    from cells import load_with_lora
    return load_with_lora(config)

def make_trainer(*arguments):
    from pathlib import Path
    from cells import make_trainer
    trainer, step, mark = make_trainer(*arguments), None, Path({str(mark)!r})
    real = trainer.training_step
    def training_step(*given, **named):
        if trainer.state.global_step == 7 and not mark.exists():
            mark.touch()
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*given, **named)
    trainer.training_step = training_step
    return trainer
"""
    (tmp_path / "oom.py").write_text(source, encoding="utf-8")
    module = import_file(tmp_path / "oom.py")
    return module.load_with_lora, module.make_trainer


@pytest.mark.parametrize("processes", [1, 2])
def test_out_of_memory_in_the_middle_goes_on_from_the_last_checkpoint(training_run, recipe, tmp_path, monkeypatch, capsys, processes):  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = training_run(hardware__processes=processes)
    summary = train(run, *out_of_memory_once(recipe, tmp_path))
    said = capsys.readouterr().out
    assert "Out of memory with micro-batch" in said and "going on from checkpoint-6 with micro-batch" in said
    assert summary["figures"]["steps"] == 12
    assert summary["figures"]["per_device_train_batch_size"] == 4 // processes // 2
    assert list(pd.read_csv(run.file("training/log.csv"))["step"]) == list(range(1, 13))
    undisturbed = training_run("undisturbed")
    train(undisturbed, *recipe)
    assert close(run, undisturbed)


def test_out_of_memory_at_the_start_begins_again_with_the_first_weights(training_run, recipe, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    run = training_run(train__save_steps=100)
    train(run, *out_of_memory_once(recipe, tmp_path))
    undisturbed = training_run("undisturbed", train__save_steps=100)
    train(undisturbed, *recipe)
    assert close(run, undisturbed)


def test_two_machines_by_accelerates_own_configuration_files(training_run, recipe):
    run = training_run()
    write_recipe(run, recipe)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        config = run.file(f"machine-{rank}.yaml")
        config.write_text(
            f"compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 2\n"
            f"machine_rank: {rank}\nmain_process_ip: 127.0.0.1\nmain_process_port: {port}\nmixed_precision: 'no'\n"
            "rdzv_backend: static\nsame_network: true\nuse_cpu: false\n"
        )
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
        command += ["-m", "utils.training.launch", str(run.path)]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))  # fmt: skip
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert json.loads(run.file(SUMMARY).read_text())["figures"]["processes"] == 2
    alone = training_run("alone")
    train(alone, *recipe)
    assert close(run, alone)


@pytest.mark.parametrize(("left", "same"), [(("a", "a"), True), (("a", "b"), False), (("a",), False)])
def test_processes_that_ended_apart_are_told(training_run, capsys, left, same):
    run = training_run()
    run.file("training").mkdir(parents=True, exist_ok=True)
    for rank, digest in enumerate(left):
        run.file(f"training/process-{rank}.sha256").write_text(digest)
    assert same_weights(run, 2) is same
    assert ("hardware.processes=1" in capsys.readouterr().out) is not same


def test_the_functions_arrive_as_they_stand_in_the_notebook(training_run, recipe):
    run = training_run()
    write_recipe(run, recipe)
    load_with_lora, make_trainer = read_recipe(run)
    assert load_with_lora.__doc__ == recipe[0].__doc__ and make_trainer.__code__.co_code == recipe[1].__code__.co_code


def test_a_sentence_from_another_process_arrives_as_itself(training_run, tmp_path):
    source = "def load_with_lora(config):\n    from utils.errors import HardwareError\n    raise HardwareError('no room')\n\n"
    (tmp_path / "failing.py").write_text(source + "def make_trainer():\n    pass\n", encoding="utf-8")
    module = import_file(tmp_path / "failing.py")
    with pytest.raises(HardwareError, match="no room"):
        train(training_run(hardware__processes=2), module.load_with_lora, module.make_trainer)


def test_a_process_that_ends_without_a_word_is_told_with_where_to_look(training_run, tmp_path):
    (tmp_path / "dying.py").write_text("def load_with_lora(config):\n    import os\n    os._exit(3)\n\ndef make_trainer():\n    pass\n")  # fmt: skip
    module = import_file(tmp_path / "dying.py")
    with pytest.raises(TrainingError, match=r"ended with status 1; read .*launch.log"):
        train(training_run(hardware__processes=2), module.load_with_lora, module.make_trainer)


def test_processes_share_an_update_evenly_or_the_number_is_refused(training_run, monkeypatch):
    assert processes_that_divide(training_run("two", hardware__processes=2)) == 2
    with pytest.raises(ConfigError, match="3 processes cannot share the 4 rows"):
        processes_that_divide(training_run("three", hardware__processes=3))
    monkeypatch.setattr("utils.training.launch.processes", lambda hardware: 3)  # three GPUs found
    assert processes_that_divide(training_run("auto")) == 2


def test_more_processes_than_gpus_are_refused_before_one_of_them_fails(training_run, monkeypatch):
    monkeypatch.setattr("utils.training.launch.gpu_ids", lambda: ("0",))
    monkeypatch.setattr("utils.training.launch.resolve_hardware", lambda hardware: {"device": "cuda"})
    with pytest.raises(ConfigError, match=r"hardware.processes=2, but this machine has 1 GPU; leave it on auto"):
        processes_that_divide(training_run("two", hardware__processes=2))


def test_accelerates_configuration_file_says_how_many_there_are_on_all_machines(training_run, tmp_path):
    file = tmp_path / "machine.yaml"
    run = training_run(hardware__accelerate_config=str(file))
    with pytest.raises(ConfigError, match=r"names no num_processes above 0; write the file with `accelerate config`"):
        processes_that_divide(run)
    for none in ("0", "-2", "[]"):  # found by `make faults`: no process to share rows with ended in a traceback
        file.write_text(f"num_processes: {none}\n")
        with pytest.raises(ConfigError, match="above 0"):
            processes_that_divide(run)
    file.write_text("num_machines: 2\nnum_processes: 4\n")
    assert processes_that_divide(run) == 4
    file.write_text("num_processes: 8\n")
    with pytest.raises(ConfigError, match="8 processes cannot share the 4 rows"):
        processes_that_divide(run)


@pytest.mark.parametrize("processes", [1])  # two were tried by hand: as slow as four launches, and as equal
def test_sessions_that_end_in_time_lead_to_the_same_adapter_as_one_long_one(training_run, recipe, processes):
    # A limit that is over as soon as it began: each session takes one update, the least that is any progress.
    parts = training_run("parts", hardware__processes=processes, hardware__max_hours=1e-6, train__max_steps=3)
    stops = []
    while True:
        try:
            train(parts, *recipe)
            break
        except SessionOver as over:
            stops.append(int(re.search(r"stopped at step (\d+) of 3 with a checkpoint", str(over))[1]))
        assert list(pd.read_csv(parts.file("training/log.csv"))["step"]) == list(range(1, len(stops) + 1))
    assert stops == [1, 2]
    short = training_run("short", hardware__processes=processes, train__max_steps=3)
    train(short, *recipe)
    assert same(parts, short)


def test_a_process_that_is_gone_keeps_the_wish_to_stop_from_no_other(monkeypatch):
    asked = []

    def gone(number):
        raise psutil.NoSuchProcess(1)

    children = [SimpleNamespace(send_signal=gone), SimpleNamespace(send_signal=asked.append)]
    launcher = SimpleNamespace(cmdline=lambda: ["accelerate", "launch"], children=lambda: children)
    monkeypatch.setattr("utils.training.launch.psutil.Process", lambda number: launcher)
    _ask_to_stop(2)
    assert asked == [signal.SIGINT]


def test_ctrl_c_stops_two_processes_at_one_step_with_a_checkpoint(training_run, recipe, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = training_run(hardware__processes=2)

    def ask():
        while not list(checkpoint_dir(run).glob(f"checkpoint-*/{LIST}")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(
        Interrupted, match=r"stopped at step \d+ of 12 with a checkpoint, because it was asked to"
    ) as told:
        train(run, *slowed_down(tmp_path))
    step = int(re.search(r"step (\d+)", str(told.value))[1])
    assert 3 <= step < 12 and (checkpoint_dir(run) / f"checkpoint-{step}" / LIST).exists()
    assert list(pd.read_csv(run.file("training/log.csv"))["step"]) == list(range(1, step + 1))
