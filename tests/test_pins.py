"""Installing on Kaggle and Colab: around the image's torch, with a word where the kernel has to be restarted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.test_hardware import lowest_version
from utils import hardware as platforms
from utils import pins as install
from utils.errors import HardwareError
from utils.hardware import Gpu, gpus, read_pins
from utils.pins import held_still, install_missing


@pytest.fixture
def image(monkeypatch):
    """`image(**versions)`: Colab's of 2026-08-19 but these; pip is recorded, and installs what it is asked for."""
    state = {name: lowest_version(pin) for name, pin in read_pins().items()}
    state |= {"torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128", "tornado": "6.5.7", "pyzmq": "26.2.1"}
    calls: list[list[str]] = []

    def run(command, **_):
        calls.append(command)
        if command[3] == "install":
            held = Path(command[command.index("--constraint") + 1]).read_text().split()
            calls[-1] = [
                *command[: command.index("--constraint")],
                *command[command.index("--constraint") + 2 :],
                "|",
                *held,
            ]
            for wanted in command[command.index("--constraint") + 2 :]:
                requirement = Requirement(wanted)
                state[platforms.canonicalize_name(requirement.name)] = lowest_version(requirement)
        else:
            state[command[-1]] = None
        return subprocess.CompletedProcess(command, 0, "", "")

    def prepare(place: str = "colab", gpu: bool = True, **versions):
        state.update({name.replace("_", "-"): version for name, version in versions.items()})
        for module in (install, platforms):
            monkeypatch.setattr(module, "installed", lambda name: state.get(platforms.canonicalize_name(name)))
            monkeypatch.setattr(module, "where", lambda: place)
            monkeypatch.setattr(module, "gpus", lambda: (Gpu("Tesla T4", 15.0, "7.5"),) if gpu else ())
        monkeypatch.setattr(install.subprocess, "run", run)
        return calls

    gpus.cache_clear()
    return prepare


def test_on_colab_what_trains_is_replaced_and_everything_else_stays_as_it_is(image, monkeypatch):
    """With exact pins 31 packages were, pandas, ipykernel and jupyter_client among them, under a running kernel."""
    calls = image(datasets="4.0.0", torchao="0.10.0", transformers="5.15.0", pyarrow="18.1.0", papermill=None)
    monkeypatch.setattr("utils.pins._loaded", dict)  # a new kernel, whatever other tests imported here
    install_missing()
    (command,) = calls
    asked, held = command[5 : command.index("|")], command[command.index("|") + 1 :]
    assert [str(Requirement(word).name) for word in asked] == [
        "transformers",
        "datasets",
        "torchao",
        "pyarrow",
        "papermill",
    ]
    assert {"datasets==4.8.5", "torchao==0.17.0", "transformers==5.17.0"} <= set(asked)
    assert held[:4] == ["torch==2.11.0+cu128", "torchvision==0.26.0+cu128", "tornado==6.5.7", "pyzmq==26.2.1"]
    assert {"pandas==2.2.3", "numpy==2.1.3", "ipykernel==6.17.1", "jupyter-client==7.4.9", "traitlets==5.7.1"} <= set(
        held
    )
    assert not {Requirement(word).name for word in asked} & {Requirement(word).name for word in held}


def test_a_newer_version_within_its_range_stays_too(image):
    image(pandas="2.3.9", rich="15.1")
    assert {"pandas==2.3.9", "rich==15.1"} <= set(held_still())


def test_without_a_gpu_no_cuda_package_is_installed_an_old_torchao_goes_and_a_warning_says_what_to_choose(
    image, capsys
):
    calls = image(gpu=False, unsloth=None, bitsandbytes=None, torchao="0.10.0")
    install_missing()
    assert [command[3:] for command in calls] == [["uninstall", "--quiet", "-y", "torchao"]]
    assert "has no GPU" in (said := capsys.readouterr().out) and "Runtime > Change runtime type > T4 GPU" in said


def test_with_a_gpu_nothing_is_warned_of_and_what_holds_is_not_installed_again(image, capsys):
    assert image() == [] and install_missing() is None
    assert capsys.readouterr().out == ""


def test_kaggles_own_client_and_kernel_are_left_alone(image):
    calls = image("kaggle", kaggle="1.8.3", ipykernel="6.16.0")
    install_missing()
    assert calls == []


def test_on_a_machine_of_ones_own_nothing_is_installed(image):
    calls = image("local", datasets="4.0.0")
    install_missing()
    assert calls == []


def test_a_kernel_that_had_loaded_what_was_replaced_has_to_be_restarted(image, monkeypatch):
    calls = image(pandas="2.2.2")
    monkeypatch.setattr(
        install.importlib.metadata, "packages_distributions", lambda: {"pandas": ["pandas"], "trl": ["trl"]}
    )
    monkeypatch.setitem(sys.modules, "pandas", sys.modules["json"])
    with pytest.raises(HardwareError, match=r"pinned pandas are installed.*Runtime > Restart session"):
        install_missing()
    install_missing()
    assert len(calls) == 1


def test_the_generated_notebook_needs_no_restart(image, monkeypatch):
    image(pandas="2.2.2")
    monkeypatch.setattr(install.importlib.metadata, "packages_distributions", lambda: {"pandas": ["pandas"]})
    monkeypatch.setitem(sys.modules, "pandas", sys.modules["json"])
    assert install_missing(restart=False) is None


def test_an_installation_that_fails_is_pips_last_line(image, monkeypatch):
    image(papermill=None)
    failed = subprocess.CompletedProcess([], 1, "", "a\nERROR: No matching distribution found for papermill\n\n")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(HardwareError, match=r"papermill<3,>=2.7: ERROR: No matching distribution.*internet is on"):
        install_missing()


def test_installing_loads_nothing_that_it_may_replace():
    code = (
        "import sys; import utils.pins; print([m for m in ('pydantic', 'yaml', 'pandas', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=platforms.ROOT)
    assert done.stdout.strip() == "[]"
