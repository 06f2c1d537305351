"""The pins: held against what is installed, and on Kaggle and Colab installed around what the image has."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.drift import frozen
from utils import hardware as platforms
from utils import pins as install
from utils.errors import HardwareError
from utils.hardware import Gpu, gpus
from utils.pins import check_pins, held_still, install_missing, read_pins
from utils.project import ROOT


def test_missing_requirements_are_a_sentence(tmp_path):
    with pytest.raises(HardwareError, match=r"requirements.txt is missing; take it back from git"):
        read_pins(tmp_path / "requirements.txt")


def lowest_version(pin) -> str:
    return next(each.version for each in pin.specifier if each.operator in ("==", ">="))


def have(monkeypatch, **versions: str | None) -> None:
    """Pretend that everything is installed at its lowest version but these packages, whose names have an _ for a -."""
    lowest = {name: lowest_version(pin) for name, pin in read_pins().items()} | {"torch": "2.10.0+cu126"}
    lowest |= {canonicalize_name(name): version for name, version in versions.items()}
    monkeypatch.setattr(install, "installed", lambda name: lowest[canonicalize_name(name)])


def test_pins_that_hold_are_reported_and_a_platforms_own_torch_build_counts(monkeypatch):
    have(monkeypatch)
    rows = check_pins(cuda=True)
    assert {row["package"] for row in rows} == set(read_pins()) and all(row["holds"] for row in rows)
    assert {"package": "trl", "pinned": "==1.14.2", "found": "1.14.2", "holds": True, "needed here": True} in rows


@pytest.mark.parametrize(
    ("package", "found", "said"),
    [
        ("trl", "1.15.0", "1.15.0"),
        ("peft", None, "not installed"),
        ("torch", "2.9.1", "2.9.1"),
        ("pandas", "2.2.2", "2.2.2"),
        ("pyarrow", "18.1.0", "18.1.0"),
    ],
)
def test_a_pin_that_does_not_hold_is_named_with_found_and_wanted(monkeypatch, package, found, said):
    have(monkeypatch, **{package: found})
    wanted = str(read_pins()[package].specifier)
    with pytest.raises(HardwareError) as caught:
        check_pins(cuda=False)
    message = str(caught.value)
    assert message.startswith(f"{package} is {said}, but requirements.txt asks for {package}{wanted}; run `pip install")


def test_a_pin_that_does_not_hold_is_only_reported_where_the_profile_says_so(monkeypatch):
    have(monkeypatch, trl="1.15.0")
    assert [row["package"] for row in check_pins(cuda=False, enforce=False) if not row["holds"]] == ["trl"]


def test_a_cuda_package_is_enforced_on_a_gpu_only(monkeypatch):
    have(monkeypatch, unsloth=None)
    assert [row["package"] for row in check_pins(cuda=False) if not row["holds"]] == ["unsloth"]
    with pytest.raises(HardwareError, match=r"unsloth is not installed, but requirements.txt asks for unsloth==2026"):
        check_pins(cuda=True)


def test_the_kernel_that_the_platform_brings_is_not_held_against_the_run(monkeypatch):
    """An image's ipykernel may be an older one, and a running kernel cannot be replaced."""
    have(monkeypatch, ipykernel="6.16.0")
    rows = {row["package"]: row for row in check_pins(cuda=False)}
    assert rows["ipykernel"]["holds"] is False


@pytest.fixture
def image(monkeypatch):
    """`image(**versions)`: Colab's of 2026-08-19 but these; pip is recorded, and installs what it is asked for."""
    state = {name: lowest_version(pin) for name, pin in read_pins().items()}
    state |= {"torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128", "tornado": "6.5.7", "pyzmq": "26.2.1"}
    calls: list[list[str]] = []

    def run(command, **_):
        _, _, pip, verb, _, *words = command
        assert pip == "pip"
        answer = ""
        if "--dry-run" in words:
            held = Path(words[words.index("--constraint") + 1]).read_text().split()
            wanted = [Requirement(word) for word in words[words.index("--constraint") + 2 :]]
            chosen = [{"metadata": {"name": one.name, "version": lowest_version(one)}} for one in wanted]
            answer = json.dumps({"install": chosen + [{"metadata": m} for m in extra]})
            calls.append(["plan", *map(str, wanted), "|", *held])
        elif verb == "install":
            state.update(frozen("\n".join(words)))
            calls.append([verb, *words])
        else:
            state[words[-1]] = None
            calls.append([verb, words[-1]])
        return subprocess.CompletedProcess(command, 0, answer, "")

    extra: list[dict[str, str]] = []

    def prepare(place: str = "colab", gpu: bool = True, loaded: tuple = (), brings: tuple = (), **versions):
        state.update({name.replace("_", "-"): version for name, version in versions.items()})
        extra.extend({"name": name, "version": version} for name, version in brings)
        for module in (install, platforms):
            monkeypatch.setattr(module, "installed", lambda name: state.get(canonicalize_name(name)))
            monkeypatch.setattr(module, "where", lambda: place)
            monkeypatch.setattr(module, "gpus", lambda: (Gpu("Tesla T4", 15.0, "7.5"),) if gpu else ())
        monkeypatch.setattr(install, "_loaded", lambda: set(loaded))
        monkeypatch.setattr(install.subprocess, "run", run)
        return calls

    gpus.cache_clear()
    return prepare


def test_on_colab_what_trains_is_replaced_and_everything_else_stays_as_it_is(image, capsys):
    """With exact pins 31 packages were, pandas, ipykernel and jupyter_client among them, under a running kernel."""
    calls = image(datasets="4.0.0", torchao="0.10.0", transformers="5.15.0", pyarrow="18.1.0", papermill=None)
    install_missing()
    plan, installation = calls
    asked, held = plan[1 : plan.index("|")], plan[plan.index("|") + 1 :]
    names = ["transformers", "datasets", "torchao", "pyarrow", "papermill"]
    assert [Requirement(word).name for word in asked] == names
    assert {"datasets==4.8.5", "torchao==0.17.0", "transformers==5.17.0"} <= set(asked)
    assert held[:4] == ["torch==2.11.0+cu128", "torchvision==0.26.0+cu128", "tornado==6.5.7", "pyzmq==26.2.1"]
    own = {"pandas==2.2.3", "numpy==2.1.3", "ipykernel==6.17.1", "jupyter-client==7.4.9", "traitlets==5.7.1"}
    assert own <= set(held) and not set(names) & {Requirement(word).name for word in held}
    assert installation[:2] == ["install", "--no-deps"] and [word.split("==")[0] for word in installation[2:]] == names
    assert f"installing 5 packages, 4 of them in place of the image's: {', '.join(names)}" in capsys.readouterr().out


def test_a_newer_version_within_its_range_stays_too(image):
    image(pandas="2.3.9", rich="15.1")
    assert {"pandas==2.3.9", "rich==15.1"} <= set(held_still())


def test_without_a_gpu_no_cuda_package_is_installed_an_old_torchao_goes_and_a_warning_says_what_to_choose(
    image, capsys
):
    calls = image(gpu=False, unsloth=None, bitsandbytes=None, torchao="0.10.0")
    install_missing()
    assert calls == [["uninstall", "torchao"]]
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


def test_that_the_kernel_has_to_be_restarted_is_said_before_anything_is_installed(image, capsys, monkeypatch):
    """`requests` comes along with datasets; papermill is new, so nobody can have loaded another one."""
    calls = image(
        datasets="4.0.0", papermill=None, requests="2.32.4", loaded=("requests", "papermill", "json"),
        brings=(("requests", "2.33.0"),),
    )  # fmt: skip
    installing, said = install.subprocess.run, []

    def run(command, **more):
        said.append(capsys.readouterr().out)
        return installing(command, **more)

    monkeypatch.setattr(install.subprocess, "run", run)
    with pytest.raises(HardwareError, match=r"pinned requests are installed.*Runtime > Restart session"):
        install_missing()
    assert "this kernel has loaded requests: once they are installed, it has to be restarted" in said[1]
    assert [call[0] for call in calls] == ["plan", "install"]
    install_missing()  # after the restart
    assert len(calls) == 2


def test_the_generated_notebook_needs_no_restart(image, capsys):
    image(datasets="4.0.0", loaded=("datasets",))
    assert install_missing(restart=False) is None and "restart" not in capsys.readouterr().out


def test_an_installation_that_fails_is_pips_last_line(image, monkeypatch):
    image(papermill=None)
    failed = subprocess.CompletedProcess([], 1, "", "a\nERROR: No matching distribution found for papermill\n\n")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(HardwareError, match=r"pip install failed: ERROR: No matching distribution.*internet is on"):
        install_missing()


def test_a_package_that_this_process_has_imported_counts_as_loaded():
    loaded = install._loaded()
    assert {"pytest", "packaging"} <= loaded and "selenium" not in loaded


def test_pip_itself_says_what_it_would_install_before_it_does(tmp_path, monkeypatch):
    """The real pip, with a package of this disk."""
    wheel = tmp_path / "some_package-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        about = "some_package-1.2.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: Some_Package\nVersion: 1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert install._plan([Requirement("some-package>=1")]) == {"some-package": "1.2"}
    assert platforms.installed("some-package") is None


def test_installing_loads_nothing_that_it_may_replace():
    code = (
        "import sys; import utils.pins; print([m for m in ('pydantic', 'yaml', 'pandas', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
