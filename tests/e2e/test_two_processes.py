"""Two processes by `accelerate launch`: killed and resumed, out of memory, asked to stop, on two machines."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from safetensors.torch import load_file

from benchmarks.recipe import notebook_source
from tests.conftest import import_file
from utils.errors import Interrupted, OutOfMemory
from utils.project import python_path
from utils.training import train_adapter
from utils.training.launch import RECIPE, SUMMARY, write_recipe
from utils.training.train import checkpoint_dir

LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TWO = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
TWO += ["--mixed_precision", "no", "--dynamo_backend", "no"]
# Notebook 03's functions from the module `cells`; {body} may change the trainer before it is handed out.
CHANGED = """
def load_with_lora(config):
    from cells import load_with_lora

    return load_with_lora(config)


def make_trainer(*arguments):
    import time
    from cells import make_trainer

    trainer = make_trainer(*arguments)
    real = trainer.training_step

    def training_step(*given, **named):
        {body}
        return real(*given, **named)

    trainer.training_step = training_step
    return trainer
"""
SLOWER = "time.sleep(0.15)"  # so that there is a middle in which to be killed


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A function: notebook 03's two functions from a module on disk, with a line more in each training step."""
    (tmp_path / "cells.py").write_text(notebook_source(), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # where launched processes find it

    def make(body: str = ""):
        path = tmp_path / ("changed.py" if body else "cells.py")
        if body:
            path.write_text(CHANGED.format(body=body), encoding="utf-8")
        module = import_file(path)
        return module.load_with_lora, module.make_trainer

    return make


def apart(one, other) -> float:
    """The largest difference between two runs' adapters."""
    a, b = (load_file(run.file("training/adapter/adapter_model.safetensors")) for run in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def wait_for_checkpoint(folder: Path) -> None:
    while not list(folder.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": python_path()}


def test_a_killed_run_of_two_processes_ends_with_the_same_weights_as_an_undisturbed_one(training_run, recipe):
    validated = {"data__validation_rows": 5, "train__eval_steps": 3, "train__keep": "best"}
    whole = training_run("whole", hardware__processes=2, **validated)
    figures = train_adapter(whole, *recipe())["figures"]
    assert figures["processes"] == 2
    assert figures["per_device_train_batch_size"] * figures["gradient_accumulation_steps"] * 2 == 4

    torn = training_run("torn", hardware__processes=2, **validated)
    write_recipe(torn, *recipe(SLOWER))
    command = [*LAUNCH, *TWO, "-m", "utils.training.launch", str(torn.path)]
    started = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(checkpoint_dir(torn))
    top = psutil.Process(started.pid)
    for process in [top, *top.children(recursive=True)]:
        process.kill()
    started.wait()
    assert not torn.file(SUMMARY).exists()  # it was not done yet
    train_adapter(torn, *recipe(SLOWER))
    assert len(list(torn.path.glob("training/checkpoints/*"))) == 1  # it resumed there
    assert apart(whole, torn) == 0
    logs = [pd.read_csv(run.file("training/log.csv")) for run in (whole, torn)]
    pd.testing.assert_frame_equal(*logs)

    # The same rows in every update: what differs between one process and two is the order of sums.
    alone = training_run("alone", **validated)
    train_adapter(alone, *recipe())
    apart_by = (pd.read_csv(alone.file("training/log.csv")) - logs[0])[["loss", "eval_loss"]].abs().max()
    assert (apart_by < 1e-3).all() and logs[0]["eval_loss"].notna().sum() == 4


def test_out_of_memory_in_one_process_is_a_sentence_that_names_what_to_lower(training_run, recipe):
    run = training_run(hardware__processes=2)
    none_left = """if trainer.state.global_step == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")"""
    with pytest.raises(OutOfMemory, match=r"micro-batch 2 x 1.*batch_size=1, train.gradient_accumulation_steps=4"):
        train_adapter(run, *recipe(none_left))


def test_ctrl_c_stops_two_processes_at_one_step_with_a_checkpoint(training_run, recipe):
    run = training_run(hardware__processes=2)

    def ask():
        while not run.file(RECIPE).exists():  # by which its checkpoints are named
            time.sleep(0.01)
        wait_for_checkpoint(checkpoint_dir(run))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask, daemon=True).start()
    stopped = r"stopped at step \d+ of 12 with a checkpoint, because it was asked to"
    with pytest.raises(Interrupted, match=stopped) as raised:
        train_adapter(run, *recipe(SLOWER))
    step = int(re.search(r"step (\d+)", str(raised.value))[1])
    assert 3 <= step < 12 and (checkpoint_dir(run) / f"checkpoint-{step}" / "rng_state_1.pth").exists()
    assert list(pd.read_csv(run.file("training/log.csv"))["step"]) == list(range(1, step + 1))


def test_two_machines_by_accelerates_own_configuration_files(training_run, recipe):
    run = training_run()
    write_recipe(run, *recipe())
    port, processes = free_port(), []
    for rank in (0, 1):
        config = run.file(f"machine-{rank}.yaml")
        config.write_text(
            f"compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 2\n"
            f"machine_rank: {rank}\nmain_process_ip: 127.0.0.1\nmain_process_port: {port}\nmixed_precision: 'no'\n"
            "rdzv_backend: static\nsame_network: true\nuse_cpu: false\n"
        )
        command = [*LAUNCH, "--config_file", str(config), "-m", "utils.training.launch", str(run.path)]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment(), **pipe))
    shown = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    assert json.loads(run.file(SUMMARY).read_text())["figures"]["processes"] == 2


@pytest.mark.parametrize("due", [0, 1])
def test_all_processes_stop_when_the_first_ones_clock_says_so(due):
    """Clocks differ by a little: whoever stopped alone would leave the others waiting for it."""
    source = f"""
from types import SimpleNamespace
from accelerate import PartialState
from utils.training.callbacks import SessionCallback
rank = PartialState(cpu=True).process_index
clock = SimpleNamespace(is_due=lambda next_s: rank == {due})
session, control = SessionCallback(clock, SimpleNamespace(asked=False)), SimpleNamespace(should_training_stop=False)
session.on_step_end(None, SimpleNamespace(global_step=1, max_steps=9), control)
print(session.ended, control.should_training_stop)
PartialState().destroy_process_group()
"""
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, command = [], [sys.executable, "-c", source]
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, **meet}
        processes.append(subprocess.Popen(command, env=environment() | place, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert said == (["deadline True"] * 2 if due == 0 else ["False"] * 2)
