"""Notebook 03's training, in the notebook's own process or in one process for each GPU.

The notebook's two functions go into training/recipe.py. With several GPUs, `accelerate launch` starts a process for each
(DistributedDataParallel), all of which run it:

    accelerate launch --config_file machine.yaml -m utils.training.launch RUN_DIR     # by hand, on several machines
"""

import argparse
import contextlib
import inspect
import runpy
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import yaml

from utils import errors
from utils.errors import ConfigError, Interrupted, TrainingError, UserError
from utils.files import read_json, write_json, write_text
from utils.hardware import global_rank, gpu_ids, local_rank, processes, resolve_hardware
from utils.pipeline.run_dir import open_run
from utils.pipeline.signals import StopRequest
from utils.pipeline.stage import StageRun
from utils.pipeline.stages import BY_NAME
from utils.processes import Child
from utils.progress import report_to
from utils.secrets import hide_secrets, redact

RECIPE, SUMMARY, _ERROR = "training/recipe.py", "training/summary.json", "training/error.json"
_LOG, _OUTPUT = "training/launch.log", "training/output.log"  # the second holds what the first process prints


def train_adapter(run: StageRun, load_with_lora: Callable, make_trainer: Callable) -> dict:
    """Train as the two functions say and leave training/adapter, log.csv and loss.png; returns training/summary.json.

    `load_with_lora(config)` returns model and tokenizer, `make_trainer(model, tokenizer, config, rows, step_plan, folder, validation=None)`
    an SFTTrainer; see notebook 03. Raises what they raise, and TrainingError where a process ended without a word.
    """
    count = processes_that_divide(run)
    write_recipe(run, load_with_lora, make_trainer)
    if count == 1 and run.config.hardware.accelerate_config is None:
        from utils.training.train import train_here

        train_here(run, load_with_lora, make_trainer)
    else:
        _launch(run, count)
    return read_json(run.file(SUMMARY))


def processes_that_divide(run: StageRun) -> int:
    """One process for each GPU, or fewer, so that each takes as many rows of an update as the others.

    Raises ConfigError where hardware.processes, or accelerate's configuration file, asks for a number that cannot.
    """
    hardware, rows = run.config.hardware, run.config.train.rows_per_update
    wanted, asked = processes(hardware), hardware.processes != "auto"
    if (path := hardware.accelerate_config) is not None:
        wanted, asked = _processes_in(path), True
    elif asked and wanted > max(1, len(gpu_ids())) and resolve_hardware(hardware)["device"] == "cuda":
        raise ConfigError(f"hardware.processes={wanted}, but this machine has {len(gpu_ids())} GPU; leave it on auto.")
    if asked and rows % wanted:
        instead = "take a number that divides them, or change train.gradient_accumulation_steps"
        raise ConfigError(f"{wanted} processes cannot share the {rows} rows of an update evenly; {instead}.")
    return max(n for n in range(1, wanted + 1) if rows % n == 0)


def _processes_in(path: Path) -> int:
    """num_processes of accelerate's configuration file, those of all machines; raises ConfigError where it names none."""
    with contextlib.suppress(OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        if (count := int(yaml.safe_load(path.read_text(encoding="utf-8"))["num_processes"])) > 0:
            return count
    found = f"hardware.accelerate_config={path} names no num_processes above 0"
    raise ConfigError(f"{found}; write the file with `accelerate config`.")


def write_recipe(run: StageRun, *functions: Callable) -> None:
    """training/recipe.py: the notebook's functions as they stand in its cells; TrainingError where no source is to be had."""
    try:
        text = "\n\n".join(textwrap.dedent(inspect.getsource(function)) for function in functions)
    except (OSError, TypeError):  # below %%time, say
        instead = "define them by def, in cells without a magic"
        raise TrainingError(f"The recipe's two functions cannot be read; {instead}.") from None
    write_text(run.file(RECIPE), text)


def read_recipe(run: StageRun) -> tuple[Callable, Callable]:
    """load_with_lora and make_trainer from training/recipe.py."""
    names = runpy.run_path(str(run.file(RECIPE)))
    return names["load_with_lora"], names["make_trainer"]


def _launch(run: StageRun, count: int) -> None:
    """Find the step plan where it is open, alone, so that a trial without memory leaves nobody waiting; then train."""
    from utils.models.load import LOADS
    from utils.models.tokenizer import model_source
    from utils.training.step_plan import plan_on_file, wants_trials

    run.file(SUMMARY).unlink(missing_ok=True)
    worker, launch = ["-m", "utils.training.launch", run.path, "--log"], [sys.executable]
    rows = pd.read_parquet(run.file("data/formatted/train.parquet"))
    if wants_trials(run.config, rows) and plan_on_file(run, rows, count) is None:
        _run_to_the_end(run, [*launch, *worker, "--trials-for", count])
        LOADS[Path(model_source(run.config)).name] += 1
    launch += ["-m", "accelerate.commands.accelerate_cli", "launch"]
    if run.config.hardware.accelerate_config is not None:
        launch += ["--config_file", run.config.hardware.accelerate_config]
    else:
        launch += ["--multi_gpu", "--num_processes", count, "--num_machines", 1, "--main_process_port", 0]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the trainer's arguments say which
    _run_to_the_end(run, [*launch, *worker])
    LOADS[Path(model_source(run.config)).name] += count


def _run_to_the_end(run: StageRun, command: list) -> None:
    """Run `command`, show what its first process prints, and raise the error that it left."""
    run.file(_ERROR).unlink(missing_ok=True)
    write_text(run.file(_OUTPUT), "")
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpu_ids())} if gpu_ids() else {}
    with (
        run.file(_OUTPUT).open(encoding="utf-8", errors="replace", newline="") as output,
        Child(command, run.file(_LOG), visible) as child,
        StopRequest(child.ask_to_stop) as stop,
    ):
        status = None
        while status is None:
            time.sleep(0.2)
            status = child.poll()  # before the last look at what it printed
            sys.stdout.write(output.read())
            sys.stdout.flush()
    if status and run.file(_ERROR).exists():
        left = read_json(run.file(_ERROR))
        raise getattr(errors, left["kind"], TrainingError)(left["message"])
    if stop.asked and not run.file(SUMMARY).exists():
        raise Interrupted("Training was asked to stop; run 03 again, it resumes from its last checkpoint.")
    if status:
        found = f"A training process ended with status {status}; read {run.file(_LOG)} ({child.last_words()})"
        raise TrainingError(f"{found} and run 03 again, it resumes from its last checkpoint.")


def run_worker(run_dir: str, log: bool = False, trials_for: int = 0) -> None:
    """What a launched process does: train with the others, or find the step plan for `trials_for` processes.

    `log`: what the first process prints goes to training/output.log, which the notebook shows.
    """
    from torch import distributed

    from utils.training.step_plan import choose_plan
    from utils.training.train import train_here

    opened = open_run("auto", run_dir)
    run = StageRun(opened.path, opened.config, BY_NAME["03_lora_training"])
    if local_rank() == 0:
        report_to(run.path)
    if log and global_rank() == 0:
        sys.stdout = run.file(_OUTPUT).open("a", buffering=1, encoding="utf-8")
        hide_secrets()
    try:
        load_with_lora, make_trainer = read_recipe(run)
        if trials_for:
            rows = pd.read_parquet(run.file("data/formatted/train.parquet"))
            choose_plan(run, *load_with_lora(run.config), rows, make_trainer, trials_for)
        else:
            train_here(run, load_with_lora, make_trainer)
        if distributed.is_initialized():  # nobody leaves while another still waits for an answer
            distributed.barrier()
            distributed.destroy_process_group()
    except UserError as error:
        write_json(run.file(_ERROR), {"kind": type(error).__name__, "message": redact(str(error))})
        raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage="accelerate launch --config_file FILE -m utils.training.launch RUN_DIR")
    parser.add_argument("run_dir")
    parser.add_argument("--log", action="store_true")
    parser.add_argument("--trials-for", type=int, default=0)
    hide_secrets()
    run_worker(**vars(parser.parse_args()))
