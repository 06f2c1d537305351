"""What is installed, locked, allowed and said of it: this environment against the lock, the lock against its sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.drift import MOST_REPLACED, NEVER_REPLACED, TABLE
from utils.hardware import CUDA_STACK, STACK, installed
from utils.pins import read_pins
from utils.project import ROOT

LOCK = ROOT / "requirements-cpu.lock"
TRAINS = {canonicalize_name(name) for name in (*STACK, *CUDA_STACK, "torchao")}
TEST_TOOLS = {"pytest", "pytest-xdist", "hypothesis", "ruff", "lm-eval", "selenium", "detect-secrets"}


def moved(lock: dict) -> list[str]:
    """A sentence for every package of the lock that is here in another version; torch by its public one."""
    told = []
    for name, pin in lock.items():
        (exact,) = pin.specifier
        found = installed(name)
        if (pin.marker is None or pin.marker.evaluate()) and (found or "").partition("+")[0] != exact.version:
            told.append(f"{name} is {found or 'not installed'}, the lock says {exact.version}; "
                        "make clean, or pip install -r requirements-cpu.lock")  # fmt: skip
    return told


def test_this_environment_is_the_locked_one():
    """Three days after a change the suite failed on a fresh machine: a package that nothing pinned had moved."""
    told = moved(read_pins(LOCK))
    assert not told, "\n".join(told)  # the list itself would be cut short


def test_a_package_moved_by_hand_is_named_with_both_versions(tmp_path):
    (tmp_path / "lock").write_text(
        f"pandas==0.1  # via us\npytest=={pytest.__version__}\nappnope==1 ; sys_platform == 'none'\n"
    )
    (told,) = moved(read_pins(tmp_path / "lock"))
    found = installed("pandas")
    assert told == f"pandas is {found}, the lock says 0.1; make clean, or pip install -r requirements-cpu.lock"


def test_the_lock_holds_exact_versions_no_address_no_path_and_no_cuda_package():
    text = LOCK.read_text(encoding="utf-8")
    for line in text.splitlines():
        assert line.startswith("#") or re.match(r"[a-z0-9-]+==[^\s*]+( ; [^#]+)?( +# via .+)?$", line), line
    assert not re.search(r"https?:|file:|--|/", text) and not re.search(r"^(nvidia|cuda|triton)\b", text, re.MULTILINE)


def test_the_lock_was_made_from_the_requirements_as_they_are():
    lock, wanted = read_pins(LOCK), read_pins(ROOT / "requirements-cpu.txt")
    for name, pin in (read_pins() | wanted).items():
        if name in wanted:
            (exact,) = lock[name].specifier
            assert pin.specifier.contains(exact.version) and read_pins().get(name, pin).specifier.contains(
                exact.version
            ), name


def test_what_trains_is_pinned_exactly_and_what_images_have_is_a_range():
    pins = read_pins()
    exact = {name for name, pin in pins.items() if str(pin.specifier).startswith("==")}
    assert exact == TRAINS | {"rouge-score"}  # which no image has
    for name in set(pins) - exact:
        assert {each.operator for each in pins[name].specifier} == {">=", "<"}, name


def test_every_pin_has_its_reason():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(len(line.partition("#")[2].strip()) > 3 for line in lines)


def test_the_cpu_requirements_take_their_versions_from_the_pins_besides_torch_and_the_test_tools():
    names = read_pins(ROOT / "requirements-cpu.txt")
    assert "-c requirements.txt" in (ROOT / "requirements-cpu.txt").read_text().splitlines()
    assert set(names) ^ set(read_pins()) == TEST_TOOLS | (TRAINS - {canonicalize_name(name) for name in STACK})
    assert {name for name, requirement in names.items() if requirement.specifier} == {"torch", *TEST_TOOLS}


def test_the_table_of_what_colabs_image_loses_is_of_these_pins_and_within_its_limits():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert table["pins"] == {name: str(pin.specifier) for name, pin in read_pins().items()}, "run make drift"
    replaced = table["after"]
    assert len(replaced) <= MOST_REPLACED and not NEVER_REPLACED & set(replaced)
    assert len(table["before"]) > len(replaced)
    assert {"unsloth", "bitsandbytes", "trl", "papermill"} <= set(table["installed"])
    assert not set(table["installed"]) & set(replaced) and table["left"]["all"] > table["left"]["used"] > 100


def test_nothing_that_the_images_kernel_has_loaded_before_the_first_cell_is_replaced():
    """Measured by tests/e2e/test_colab.py with the image's IPython and ipykernel; colabtools loads no pandas at its start."""
    ran = json.loads((TABLE.parent / "colab-run.json").read_text(encoding="utf-8"))
    loaded = {canonicalize_name(name) for name in ran["loaded before the first cell"]["packages"]}
    replaced = json.loads(TABLE.read_text(encoding="utf-8"))["after"]
    assert {"ipython", "ipykernel", "tornado", "pyzmq"} <= loaded and not loaded & set(replaced)


def test_make_address_does_without_what_only_gnu_sed_has(tmp_path):
    """macOS's `sed -i` takes the next word for a suffix."""
    for name in ("README.md", "utils/project.py", "notebooks/a.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('REPOSITORY = "OWNER/x"\nhttps://github.com/OWNER/x\n')
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements-cpu.lock").touch()
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "installed").touch()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    bsd = tmp_path / "bin" / "sed"
    bsd.parent.mkdir()
    bsd.write_text(
        f'#!/bin/sh\ncase "$1" in -i) echo "sed: 1: invalid command code" >&2; exit 1;; esac\nexec {shutil.which("sed")} "$@"\n'
    )
    bsd.chmod(0o755)
    path = f"{bsd.parent}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "address", "REPOSITORY=me/fork", "VENV=venv", "MAKE=true"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("README.md", "utils/project.py", "notebooks/a.ipynb"):
        assert Path(tmp_path / name).read_text() == 'REPOSITORY = "me/fork"\nhttps://github.com/me/fork\n'
