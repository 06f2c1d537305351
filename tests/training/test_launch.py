"""Launching: how many processes, the recipe that they run, and what they print and leave arrives here."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import partial

import pytest

from benchmarks.recipe import notebook_source
from tests.conftest import import_file
from utils.errors import ConfigError, HardwareError, Interrupted, TrainingError
from utils.training import launch
from utils.training.launch import processes_that_divide, read_recipe, run_worker, write_recipe


def test_the_functions_arrive_as_they_stand_in_the_notebook(training_run, tmp_path):
    path = tmp_path / "cells.py"
    path.write_text(notebook_source(), encoding="utf-8")
    cells, run = import_file(path), training_run()
    write_recipe(run, cells.load_with_lora, cells.make_trainer)
    load_with_lora, make_trainer = read_recipe(run)
    assert load_with_lora.__doc__ == cells.load_with_lora.__doc__
    assert make_trainer.__code__.co_code == cells.make_trainer.__code__.co_code


@pytest.mark.parametrize("kind", ["below a magic", "partial"])
def test_a_function_without_a_source_is_told_so(training_run, kind):
    names = {}
    exec("def load_with_lora(config): pass", names)
    function = partial(print) if kind == "partial" else names["load_with_lora"]
    with pytest.raises(TrainingError, match="cannot be read; define them by def, in cells without a magic"):
        write_recipe(training_run(), function)


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


def process(run, code: str) -> list[str]:
    """A command that runs `code` in the training's folder, where a launched process leaves its output and its error."""
    folder = run.file("training")
    return [sys.executable, "-c", f"import json, os, sys, time; os.chdir({str(folder)!r})\n{code}"]


def test_what_the_first_process_prints_is_shown_as_it_comes_and_warnings_stay_in_the_log(training_run, capsys):
    run = training_run()
    code = "open('output.log', 'a').write('loss 0,5 █\\r'); print('warning')"
    launch._run_to_the_end(run, process(run, code))
    assert capsys.readouterr().out == "loss 0,5 █\r"
    assert run.file("training/launch.log").read_text() == "warning\n"


def test_a_sentence_from_another_process_arrives_as_itself(training_run):
    run = training_run()
    code = "json.dump({'kind': 'HardwareError', 'message': 'no room'}, open('error.json', 'w')); sys.exit(1)"
    with pytest.raises(HardwareError, match="no room"):
        launch._run_to_the_end(run, process(run, code))


def test_a_process_leaves_its_error_where_the_notebook_looks(training_run, monkeypatch):
    run = training_run()

    def fail(_):
        raise HardwareError("no room")

    monkeypatch.setattr(launch, "read_recipe", fail)
    with pytest.raises(HardwareError):
        run_worker(str(run.path))
    assert '"HardwareError"' in run.file("training/error.json").read_text()


def test_a_process_that_ends_without_a_word_is_named_with_where_to_look(training_run):
    run = training_run()
    with pytest.raises(TrainingError, match=r"ended with status 3; read .*launch.log \(Killed\) and run 03 again"):
        launch._run_to_the_end(run, process(run, "print('Killed', flush=True); os._exit(3)"))


def test_a_wish_to_stop_reaches_what_has_no_checkpoint_to_write(training_run):
    run = training_run()

    def ask():
        while not run.file("training/started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Interrupted, match="asked to stop; run 03 again"):
        launch._run_to_the_end(run, process(run, "open('started', 'w').close(); time.sleep(60)"))
