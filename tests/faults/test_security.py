"""What comes from outside is data: it is never run, it never leaves its folder, it is shown as text; and no secret is told."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils.errors import ModelError, UserError


class Payload:
    """Unpickled, it writes a file: what a pickle from outside could do instead is anything."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w').write('ran')",)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def pickled(marker):
    """The payload in each form in which a file of weights or of a trainer's state can carry it: bare, and inside torch's zip."""
    import torch

    inside = io.BytesIO()
    torch.save({"state": Payload(marker)}, inside)
    return {"bare": pickle.dumps(Payload(marker)), "torch": inside.getvalue()}


def test_the_planted_pickles_do_run_where_they_are_trusted(pickled, marker):
    """The control: without it the tests below could not fail."""
    import torch

    pickle.loads(pickled["bare"])
    assert marker.exists()
    marker.unlink()
    torch.load(io.BytesIO(pickled["torch"]), weights_only=False)
    assert marker.exists()


def outcome(action) -> tuple[str, BaseException | None]:
    try:
        action()
    except UserError as error:
        return "sentence", error
    except Exception as error:
        return "traceback", error
    return "nothing", None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_weights_that_are_a_pickle_are_refused_in_a_sentence(
    name, pickled, marker, tiny_folder, tmp_path, record_fault, training_run
):
    from utils.models import load_model

    run = training_run()
    told = []
    for form, content in pickled.items():
        folder = tmp_path / form
        if name == "pytorch_model.bin":
            shutil.copytree(tiny_folder, folder)
            (folder / "model.safetensors").unlink()
            model = run.config.model.model_copy(update={"name": str(folder)})
            config, adapter = run.config.model_copy(update={"model": model}), None
        else:
            folder.mkdir()
            config, adapter = run.config, folder
            lora = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_folder), "target_modules": ["q_proj"]}
            (folder / "adapter_config.json").write_text(json.dumps(lora))
        (folder / name).write_bytes(content)
        told.append(outcome(lambda config=config, adapter=adapter: load_model(config, adapter)))
    refused = [kind == "sentence" for kind, _ in told]
    record_fault("weights that are a pickle", tried=2, survived=sum(refused) if not marker.exists() else 0)
    assert not marker.exists() and all(isinstance(error, ModelError) for _, error in told), told
    assert all("safetensors" in str(error) for _, error in told)


def test_a_pickle_planted_in_a_checkpoint_is_not_run_when_training_resumes(
    pickled, marker, training_run, tiny_folder, record_fault
):
    from benchmarks.recipe import notebook_functions
    from utils.training import checkpoint_dir, find_checkpoint, train_here

    functions = notebook_functions()
    run = training_run()
    train_here(run, *functions)
    checkpoint = Path(find_checkpoint(checkpoint_dir(run)))
    planted = sorted(path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin"))
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} <= set(planted)
    whole = Path(shutil.copytree(checkpoint, run.path / "whole"))
    for name in planted:
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.copytree(whole, checkpoint)
        (checkpoint / name).write_bytes(pickled["bare" if name == "training_args.bin" else "torch"])
        outcome(lambda: train_here(run, *functions))
    tried = len(planted)
    record_fault("pickle planted in a checkpoint", tried=tried, survived=0 if marker.exists() else tried)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["llama", "evilmodel"])
def test_code_that_a_model_folder_brings_is_not_run_even_if_somebody_says_yes(
    kind, tiny_folder, tmp_path, marker, record_fault
):
    """transformers asks [y/N] where nobody decided: here it is decided, so nobody is asked."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').write('ran')\nclass C: pass\nclass M: pass\nclass T: pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": names}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}})
    )
    code = f"""
from utils.config import load_config
from utils.errors import ModelError
from utils.models import load_model
from utils.loadback import load_export
config = load_config("demo", {{"model.name": {str(folder)!r}}})
for load in (lambda: load_model(config), lambda: load_export(config, __import__("pathlib").Path({str(folder)!r}), None, None, False)):
    try:
        load()
        print("loaded")
    except (ModelError, ValueError) as error:
        print("sentence:", str(error).splitlines()[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input="y\n" * 9, capture_output=True, text=True, check=False
    )
    told = done.stdout.splitlines()
    record_fault("model folder with code of its own", tried=2, survived=0 if marker.exists() else len(told))
    assert not marker.exists() and done.returncode == 0, done.stderr[-2000:]
    assert told == ["loaded"] * 2 if kind == "llama" else all(line.startswith("sentence:") for line in told), (
        done.stdout
    )
    assert "[y/N]" not in done.stdout + done.stderr
