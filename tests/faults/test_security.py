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

from utils.errors import ModelError, UserError
from utils.files import relative_name
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


@pytest.mark.parametrize("form", ["bare", "torch"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_weights_that_are_a_pickle_are_refused_in_a_sentence(
    name, form, pickled, marker, tiny_folder, tmp_path, fault, training_run
):
    from utils.models.load import load_model

    fault("weights that are a pickle")
    run, folder = training_run(), tmp_path / "folder"
    config, adapter = run.config, None
    if name == "pytorch_model.bin":
        shutil.copytree(tiny_folder, folder)
        (folder / "model.safetensors").unlink()
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": str(folder)})})
    else:
        folder.mkdir()
        adapter = folder
        lora = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_folder), "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(lora))
    (folder / name).write_bytes(pickled[form])
    with pytest.raises(ModelError, match="safetensors"):
        load_model(config, adapter)
    assert not marker.exists()


def test_a_pickle_planted_in_a_checkpoint_is_not_run_when_training_resumes(pickled, marker, training_run, fault):
    from benchmarks.recipe import notebook_functions
    from utils.training.train import checkpoint_dir, find_checkpoint, train_here

    functions, run = notebook_functions(), training_run(train__max_steps=6, train__save_steps=3)
    train_here(run, *functions)
    folder = checkpoint_dir(run)
    shutil.rmtree(find_checkpoint(folder))  # that of the last update, from which no training goes on
    checkpoint = Path(find_checkpoint(folder))
    whole = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin")}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} <= set(whole)
    fault("pickle planted in a checkpoint", tried=len(whole))
    for name, content in whole.items():
        (checkpoint / name).write_bytes(pickled["bare" if name == "training_args.bin" else "torch"])
        assert find_checkpoint(folder) == str(checkpoint)
        refused = pytest.raises(Exception, match=r"weights_only|Unsupported")  # it is read, and refused
        with refused if name == "optimizer.pt" else contextlib.suppress(Exception):
            train_here(run, *functions)
        (checkpoint / name).write_bytes(content)
        for later in folder.glob("checkpoint-*"):
            if later != checkpoint:
                shutil.rmtree(later)
        assert not marker.exists(), name


@pytest.mark.parametrize("kind", ["llama", "evilmodel"])
def test_code_that_a_model_folder_brings_is_not_run_even_if_somebody_says_yes(
    kind, tiny_folder, tmp_path, marker, fault
):
    """transformers asks [y/N] where nobody decided: here it is decided, so nobody is asked."""
    fault("model folder with code of its own", tried=2)
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


def test_the_bundle_unpacks_into_its_own_folder_whatever_its_members_are_called(tmp_path, monkeypatch, fault):
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
    fault("archive members that point outside", tried=5)
    assert left == [] and links == [] and list((tmp_path / "scratch/series").rglob("planted"))


def hostile_tar(kind: str, outside: Path) -> bytes:
    """A source distribution of llama-cpp-python with one member more, which leaves its folder."""
    name = {"dots": "../../planted", "absolute": f"{outside}/planted"}.get(kind, "llama_cpp_python-0/way")
    member, stream = tarfile.TarInfo(name), io.BytesIO()
    if kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, str(outside)
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("llama_cpp_python-0/vendor/llama.cpp/CMakeLists.txt"), io.BytesIO())
        archive.addfile(member, io.BytesIO())
        if kind == "link":
            archive.addfile(tarfile.TarInfo(f"{name}/planted"), io.BytesIO())
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["dots", "absolute", "link"])
def test_the_source_of_llama_cpp_is_refused_where_a_member_leaves_its_folder(kind, tmp_path, monkeypatch, fault):
    from benchmarks import llama_cpp

    fault("archive members that point outside")
    outside, home = tmp_path / "outside", tmp_path / "home" / kind
    outside.mkdir()

    call = llama_cpp._call

    def download(command, *told):
        if command[0] == "tar":
            call(command, *told)
        if "download" in command:
            place = Path(command[command.index("--dest") + 1])
            (place / "llama_cpp_python-0.tar.gz").write_bytes(hostile_tar(kind, outside))

    monkeypatch.setattr(llama_cpp, "_call", download)
    lands_inside = kind == "absolute"  # its slash is left off
    with contextlib.nullcontext() if lands_inside else pytest.raises(UserError):
        llama_cpp.build_llama_cpp(home)
    assert not [*outside.iterdir()] and not (tmp_path / "planted").exists() and home.exists() == lands_inside


BAD_NAMES = ["../planted", "/etc/planted", "runs/t4/../../../planted", "a\\..\\..\\planted", "nul\0l", "line\nbreak", "", ".", "a/"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_output_that_kaggle_lists_with_such_a_name_is_fetched_from_nowhere(name, fault):
    fault("output names that point outside")
    assert relative_name("runs/t4/manifest.json") and relative_name(name) is None  # what Kaggle.output asks
