"""Notebook 03's training, in the notebook's own process or in one process for each GPU.

    train(run, load_with_lora, make_trainer)

With one GPU, or none, both functions are called here. With several, their source goes into training/recipe.py, and
`accelerate launch` starts a process for each GPU (DistributedDataParallel), all of which run it:

    accelerate launch --config_file machine.yaml -m utils.training.launch RUN_DIR     # by hand, on several machines
"""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import psutil
import yaml

from utils import errors
from utils.config import parse_yaml
from utils.errors import ConfigError, Interrupted, TrainingError, UserError
from utils.evaluation.workers import PARENT, end_with_parent
from utils.files import write_text
from utils.hardware import gpu_ids, local_rank, processes, resolve_hardware
from utils.pipeline.run_dir import open_run
from utils.pipeline.signals import StopRequest
from utils.pipeline.stage import StageRun
from utils.pipeline.stages import BY_NAME
from utils.progress import report_to
from utils.project import ROOT, python_path
from utils.sealed import read_sealed, write_sealed
from utils.secrets import hide_secrets, redact

RECIPE, SUMMARY, _ERROR, _LOG = (
    f"training/{name}" for name in ("recipe.py", "summary.json", "error.json", "launch.log")
)
_AGAIN = "OutOfMemory"  # the kind of error after which a safer fit is on file


def train(run: StageRun, load_with_lora: Callable, make_trainer: Callable) -> dict:
    """Train as the two functions say and leave training/adapter, log.csv and loss.png; returns training/summary.json.

    After several processes its figures have `same_on_all_processes`, see `same_weights`. `load_with_lora(config)` returns
    model and tokenizer, `make_trainer(model, tokenizer, config, rows, fit, folder)` an SFTTrainer; see notebook 03. Raises
    what they raise, and TrainingError where a process ended without a word.
    """
    count = processes_that_divide(run)
    if count == 1 and run.config.hardware.accelerate_config is None:
        from utils.training.train import train_here

        train_here(run, load_with_lora, make_trainer)
        return _summary(run)
    write_recipe(run, (load_with_lora, make_trainer))
    _launch_until_done(run, count)
    summary = _summary(run)
    summary["figures"]["same_on_all_processes"] = same_weights(run, count)
    return summary


def _summary(run: StageRun) -> dict:
    return json.loads(run.file(SUMMARY).read_text(encoding="utf-8"))


def same_weights(run: StageRun, count: int) -> bool:
    """Whether all `count` processes ended with the same trained weights, bit for bit; prints a sentence where not.

    DistributedDataParallel gives each process the same gradients and trusts that the weights stay the same; what one of
    them alone got wrong, such as its optimizer's state after a checkpoint, would be seen nowhere else.
    """
    left = {path.name: path.read_text(encoding="utf-8") for path in _digests(run)}
    if len(left) == count and len(set(left.values())) == 1:
        return True
    print(
        f"The {count} processes ended with {len(set(left.values()))} different sets of weights ({', '.join(sorted(left))} in "
        f"training/); the adapter is the first one's. Train with hardware.processes=1 to be sure of it, and tell us."
    )
    return False


def _digests(run: StageRun) -> list[Path]:
    return list(run.file("training").glob("process-*.sha256"))


def processes_that_divide(run: StageRun) -> int:
    """One process for each GPU, or fewer, so that each takes as many rows of an update as the others.

    Raises ConfigError where hardware.processes, or accelerate's configuration file, asks for a number that cannot.
    """
    hardware, rows = run.config.hardware, run.config.train.rows_per_update
    wanted, asked = processes(hardware), hardware.processes != "auto"
    if hardware.accelerate_config is not None:
        wanted, asked = _processes_in(hardware.accelerate_config), True
    elif asked and wanted > max(1, len(gpu_ids())) and resolve_hardware(hardware)["device"] == "cuda":
        raise ConfigError(f"hardware.processes={wanted}, but this machine has {len(gpu_ids())} GPU; leave it on auto.")
    if rows % wanted == 0:
        return wanted
    if asked:
        raise ConfigError(
            f"{wanted} processes cannot share the {rows} rows of an update evenly; take a number that divides them, "
            "or change train.gradient_accumulation_steps."
        )
    return max(n for n in range(1, wanted + 1) if rows % n == 0)


def _processes_in(path: Path) -> int:
    """num_processes of accelerate's configuration file, those of all machines; raises ConfigError where it names none."""
    try:
        count = int(parse_yaml(path.read_text(encoding="utf-8"))["num_processes"])
        if count < 1:
            raise ValueError("no process")
        return count
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"hardware.accelerate_config={path} names no num_processes above 0; write the file with `accelerate config`."
        ) from None


def write_recipe(run: StageRun, functions: Sequence[Callable]) -> Path:
    """training/recipe.py: the notebook's functions as they stand in its cells, for the other processes."""
    source = "\n\n".join(textwrap.dedent(inspect.getsource(function)) for function in functions)
    names = ", ".join(function.__name__ for function in functions)
    write_text(run.file(RECIPE), f'"""From notebook 03: {names}."""\n\n{source}')
    return run.file(RECIPE)


def read_recipe(run: StageRun) -> tuple[Callable, Callable]:
    """load_with_lora and make_trainer from training/recipe.py."""
    spec = importlib.util.spec_from_file_location("recipe", run.file(RECIPE))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_with_lora, module.make_trainer


def _launch_until_done(run: StageRun, count: int) -> None:
    from utils.training.step_plan import FILE, fit_on_file, wants_trials

    for path in (run.file(SUMMARY), *_digests(run)):
        path.unlink(missing_ok=True)
    rows = pd.read_parquet(run.file("data/formatted/train.parquet"))
    if fit_on_file(run, rows, count) is None:
        run.file(FILE).unlink(missing_ok=True)  # every process takes what is there
    if wants_trials(run.config) and not run.file(FILE).exists():
        # Alone, so that a trial which runs out of memory leaves no other process waiting for it.
        _run_to_the_end(
            run, [sys.executable, "-m", "utils.training.launch", str(run.path), "--trial", str(count)], gpu_ids()[:1]
        )
    here = gpu_ids() if run.config.hardware.accelerate_config else gpu_ids()[:count]
    while not _run_to_the_end(run, _command(run, count), here):
        print(_left(run)["message"])


def _command(run: StageRun, count: int) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    if run.config.hardware.accelerate_config is not None:
        launch += ["--config_file", str(run.config.hardware.accelerate_config)]
    else:
        launch += ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # the trainer's arguments say which
    return [*launch, "-m", "utils.training.launch", str(run.path)]


def _run_to_the_end(run: StageRun, command: list[str], visible: Sequence[str]) -> bool:
    """Run `command` with its output shown here as it comes; False where memory ran out, raises any other error it left."""
    run.file(_ERROR).unlink(missing_ok=True)
    environment = {**os.environ, PARENT: "1", "PYTHONPATH": python_path()}
    if visible:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
    run.file(_LOG).parent.mkdir(parents=True, exist_ok=True)
    with run.file(_LOG).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            start_new_session=True,  # or Ctrl-C would reach the launcher, which ends its processes without a checkpoint
        )  # fmt: skip
        try:
            decode = codecs.getincrementaldecoder("utf-8")("replace").decode
            with StopRequest(lambda: _ask_to_stop(process.pid)) as stop:
                while chunk := os.read(process.stdout.fileno(), 4096):
                    sys.stdout.write(decode(chunk))
                    sys.stdout.flush()
                status = process.wait()
        finally:
            process.stdin.close()  # upon which each of the processes ends, also those whose launcher was killed
            process.terminate()
            process.wait()
            process.stdout.close()
    if status and (left := _left(run)):
        if left["kind"] == _AGAIN:
            return False
        raise _error_types().get(left["kind"], TrainingError)(left["message"])
    if stop.asked and (status or "--trial" in command):
        raise Interrupted("Training was asked to stop; run 03 again, it goes on from its last checkpoint.")
    if status:
        lines = run.file(_LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        raise TrainingError(
            f"A training process ended with status {status}; read {run.file(_LOG)} ({lines[-1][:200]}) and run 03 again, "
            "it goes on from its last checkpoint."
        )
    return True


def _ask_to_stop(launcher: int) -> None:
    """SIGINT for each training process, which then stops with a checkpoint; a trial, which has none to write, just ends."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(launcher)
        for process in [started] if "--trial" in started.cmdline() else started.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it is done; the others are not
                process.send_signal(signal.SIGINT)


def _left(run: StageRun) -> dict:
    """What a process wrote before it ended: kind and message of an error; empty where nothing that is whole is there."""
    return read_sealed(run.file(_ERROR))


def _error_types() -> dict[str, type[UserError]]:
    return {
        kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, UserError)
    }


def take_part(run_dir: str, trial_for: int = 0) -> None:
    """What a launched process does: train with the others, or, with `trial_for`, try fits for that many processes."""
    from utils.training.step_plan import choose_fit
    from utils.training.train import OutOfMemory, train_here

    opened = open_run("auto", run_dir)
    run = StageRun(opened.path, opened.config, BY_NAME["03_lora_training"])
    if local_rank() == 0:
        report_to(run.path)
    else:
        log = run.file(f"training/process-{os.environ['RANK']}.log").open("a", encoding="utf-8")
        sys.stdout = log  # what the first process of a machine says is said for all
        hide_secrets()
    try:
        load_with_lora, make_trainer = read_recipe(run)
        if trial_for:
            model, tokenizer = load_with_lora(run.config)
            rows = pd.read_parquet(run.file("data/formatted/train.parquet"))
            choose_fit(run, model, tokenizer, rows, make_trainer, trial_for)
        else:
            train_here(run, load_with_lora, make_trainer)
            _part_together()
    except UserError as error:
        write_sealed(run.file(_ERROR), {"kind": type(error).__name__, "message": redact(str(error))})
        raise
    except OutOfMemory as error:
        write_sealed(run.file(_ERROR), {"kind": _AGAIN, "message": str(error)})
        raise


def _part_together() -> None:
    """Nobody leaves while another still waits for an answer."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit("Say which run: accelerate launch --config_file machine.yaml -m utils.training.launch RUN_DIR")
    hide_secrets()
    if os.environ.get(PARENT):
        end_with_parent()
    with contextlib.suppress(BrokenPipeError):
        take_part(sys.argv[1], int(sys.argv[3]) if "--trial" in sys.argv else 0)
