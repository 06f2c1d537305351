"""What comes from outside is data: it is never run, and it never leaves its folder."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nbformat
import pytest

from utils.errors import InfrastructureError, ModelError, UserError
from utils.project import ROOT


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
    from utils.models.load import load_model

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
    from utils.training.train import checkpoint_dir, find_checkpoint, train_here

    functions = notebook_functions()
    run = training_run()
    train_here(run, *functions)
    checkpoint = Path(find_checkpoint(checkpoint_dir(run)))
    planted = sorted(path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin"))
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} <= set(planted)
    whole, told = Path(shutil.copytree(checkpoint, run.path / "whole")), {}
    for name in planted:
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.copytree(whole, checkpoint)
        (checkpoint / name).write_bytes(pickled["bare" if name == "training_args.bin" else "torch"])
        assert find_checkpoint(checkpoint_dir(run)) == str(checkpoint)
        told[name], _ = outcome(lambda: train_here(run, *functions))
    tried = len(planted)
    record_fault("pickle planted in a checkpoint", tried=tried, survived=0 if marker.exists() else tried)
    assert not marker.exists()
    assert "nothing" not in (told["optimizer.pt"], told["scheduler.pt"]), told  # they were read, and refused


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
from utils.models.load import load_model
from utils.export.verify import load_export
config = load_config("demo", {{"model.name": {str(folder)!r}}})
for load in (lambda: load_model(config), lambda: load_export(config, {str(folder)!r})):
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


def packed_zip(names: list[str]) -> bytes:
    """A zip whose members are called so, the last one a symbolic link to /etc with a file below it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(name, "planted")
        link = zipfile.ZipInfo("way")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "../outside")
        archive.writestr("way/planted", "planted")
    return packed.getvalue()


def test_the_bundle_unpacks_into_its_own_folder_whatever_its_members_are_called(tmp_path, monkeypatch, record_fault):
    """The checksum is made to match: the archive is what somebody else put together."""
    from utils.kaggle.bundle import TEMPLATE

    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "scratch"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("SERIES_ROOT", "")
    (tmp_path / "outside").mkdir()
    names = ["../outside/planted", f"{tmp_path}/outside/planted", "a/../../outside/planted", "..\\outside\\planted"]
    packed = packed_zip(names)
    fields = {"LISTING": "", "DIGEST": "0" * 64, "ARCHIVE": base64.b64encode(packed).decode(), "NAME": "series",
              "CHECKSUM": hashlib.sha256(packed).hexdigest()}  # fmt: skip
    source = nbformat.read(TEMPLATE, as_version=4).cells[2].source
    for name, value in fields.items():
        source = source.replace(f"@{name}@", value)
    with contextlib.suppress(OSError):  # `way` is a file, so nothing can be put below it
        exec(source, {})
    left = [
        path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "scratch/series")
    ]
    links = [path for path in tmp_path.rglob("*") if path.is_symlink()]
    record_fault("archive members that point outside", tried=5, survived=5 * (not left and not links))
    assert left == [] and links == [] and list((tmp_path / "scratch/series").rglob("planted"))


def hostile_tars(folder: Path) -> dict[str, bytes]:
    """A source distribution of llama-cpp-python with one member more, which leaves its folder."""
    members = {
        "dots": "../../planted",
        "absolute": str(folder / "planted"),
        "link": "llama_cpp_python-0/way",
    }
    packed = {}
    for kind, name in members.items():
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            inside = tarfile.TarInfo("llama_cpp_python-0/vendor/llama.cpp/CMakeLists.txt")
            archive.addfile(inside, io.BytesIO())
            member = tarfile.TarInfo(name)
            if kind == "link":
                member.type, member.linkname = tarfile.SYMTYPE, str(folder)
            else:
                member.size = len(b"planted")
            archive.addfile(member, io.BytesIO(b"planted"))
            if kind == "link":
                below = tarfile.TarInfo(f"{name}/planted")
                below.size = len(b"planted")
                archive.addfile(below, io.BytesIO(b"planted"))
        packed[kind] = stream.getvalue()
    return packed


def test_the_source_of_llama_cpp_is_refused_where_a_member_leaves_its_folder(tmp_path, monkeypatch, record_fault):
    from utils.export import gguf

    outside = tmp_path / "outside"
    outside.mkdir()
    told, run = {}, subprocess.run
    for kind, content in hostile_tars(outside).items():

        def download(command, content=content, **options):
            if command[0] == "tar":
                return run(command, **options)
            if "download" in command:
                place = Path(command[command.index("--dest") + 1])
                (place / "llama_cpp_python-0.tar.gz").write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(gguf.subprocess, "run", download)
        kind_of_end, error = outcome(lambda kind=kind: gguf.build_llama_cpp(tmp_path / "home" / kind))
        told[kind] = (kind_of_end, str(error))
    planted = [path for path in tmp_path.rglob("planted")]
    kinds = {kind: ended for kind, (ended, _) in told.items()}
    survived = sum(ended != "traceback" for ended in kinds.values()) * (not planted)
    record_fault("archive members that point outside", tried=len(told), survived=survived)
    wanted = dict.fromkeys(told, "sentence") | {"absolute": "nothing"}  # its slash is left off: it lands inside
    assert planted == [] and kinds == wanted, told
    left = [path.name for path in (tmp_path / "home").glob("*")]
    assert left == [kind for kind, ended in wanted.items() if ended == "nothing"]


BAD_NAMES = [
    "../planted",
    "/etc/planted",
    "runs/t4/../../../planted",
    "a\\..\\..\\planted",
    "nul\0l",
    "line\nbreak",
    "",
    ".",
    "a/",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_output_that_kaggle_lists_with_such_a_name_is_fetched_from_nowhere(name, record_fault):
    from utils.kaggle.api import require_names_below

    ended, error = outcome(lambda: require_names_below(["runs/t4/manifest.json", name]))
    record_fault("output names that point outside", survived=int(ended == "sentence"))
    assert isinstance(error, InfrastructureError) and "nothing was kept" in str(error), error
