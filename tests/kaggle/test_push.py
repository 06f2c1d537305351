"""Contract tests: the real, unmodified Kaggle command line and package against a server on 127.0.0.1."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from rich.console import Console

from tests import fake_tokens
from tests.loopback import Answer, forget_kaggle, kaggle_cli, kaggle_environment, series_call, series_cli
from utils.config import load_config
from utils.errors import ConfigError, InfrastructureError, ServiceError
from utils.kaggle import bundle, push
from utils.kaggle.push import find_reference, kernel_text, read_metadata, title_of
from utils.project import PROFILES, ROOT
from utils.secrets import _on_disk

REFERENCE = "alice/deepseek-r1-medical-lora"


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def checkout(tmp_path):
    """What `kaggle kernels push -p .` reads, with the user filled in as the README says."""
    metadata = json.loads((ROOT / "kernel-metadata.json").read_text())
    metadata["id"] = REFERENCE
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata))
    (folder / "kaggle_kernel.ipynb").write_text(kernel_text())
    return folder


def test_plain_kaggle_kernels_push_sends_a_private_t4_kernel_of_less_than_900_kb(kaggle_server, home, checkout):
    done = kaggle_cli(kaggle_server, home, "kernels", "push", "-p", ".", cwd=checkout)
    assert done.returncode == 0 and "Kernel version 1 successfully pushed" in done.stdout, done.stderr
    assert "title does not resolve" not in done.stdout  # another slug would make a second kernel
    (body,) = kaggle_server.versions
    text = body.pop("text")
    assert body == {
        "slug": REFERENCE, "newTitle": "DeepSeek R1 medical LoRA", "language": "python", "kernelType": "notebook",
        "isPrivate": True, "enableGpu": True, "enableTpu": False, "enableInternet": True, "machineShape": "NvidiaTeslaT4",
    }  # fmt: skip
    assert len(text) < 900_000
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
        assert set(cell.metadata) <= {"tags"} and "injected-parameters" not in cell.metadata.get("tags", [])


def test_our_push_sends_what_the_command_line_sends(kaggle_server, home, checkout):
    kaggle_cli(kaggle_server, home, "kernels", "push", "-p", ".", cwd=checkout)
    done = series_cli(kaggle_server, home, "push")
    assert done.returncode == 0, done.stderr
    assert "version 2 of alice/deepseek-r1-medical-lora runs: https://www.kaggle.com/code/alice/" in done.stdout
    theirs, ours = kaggle_server.versions
    assert ours == theirs
    (sent,) = kaggle_server.calls("SaveKernel")[1:]
    assert sent.headers["Authorization"].startswith("Basic ")


def test_a_profile_and_settings_travel_in_the_parameters_cell_and_end_the_session_in_time(kaggle_server, home):
    done = series_call(kaggle_server, home, "push", "--profile", "full", "--set", "train.max_steps=10", "--username", "bob",
                  "--slug", "another-name")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (body,) = kaggle_server.versions
    assert (body["slug"], body["newTitle"]) == ("bob/another-name", "another name")
    assert body["sessionTimeoutSeconds"] == 9 * 3600  # hardware.max_hours and an hour for saving
    (cell,) = [c for c in json.loads(body["text"])["cells"] if "parameters" in c["metadata"].get("tags", [])]
    values: dict = {}
    exec(cell["source"], values)
    assert (values["PROFILE"], values["OVERRIDES"]) == ("full", {"train.max_steps": 10})


def test_no_run_saves_a_version_and_says_what_to_do_in_the_editor(kaggle_server, home):
    done = series_call(kaggle_server, home, "push", "--no-run")
    assert done.returncode == 0 and "Add-ons > Secrets" in done.stdout
    assert kaggle_server.versions[0]["kernelExecutionType"] == "QUICK_SAVE"


def test_no_run_and_until_done_exclude_each_other(kaggle_server, home):
    done = series_call(kaggle_server, home, "push", "--no-run", "--until-done", "--poll", "0.01")
    assert (
        done.returncode == 1
        and "starts no session that --until-done could wait for" in done.stderr
        and not kaggle_server.received
    )


def test_a_dry_run_shows_what_would_be_sent_and_leaves_it_as_the_command_line_takes_it(kaggle_server, home, tmp_path):
    words = ["push", "--profile", "t4", "--set", "train.seed=1", "--username", "alice"]
    dry = series_call(kaggle_server, home, *words, "--dry-run", TMPDIR=str(tmp_path))
    assert dry.returncode == 0, dry.stderr
    assert not kaggle_server.received
    assert f'id: "{REFERENCE}"' in dry.stdout and 'machine_shape: "NvidiaTeslaT4"' in dry.stdout
    assert "PROFILE = 't4'" in dry.stdout and "OVERRIDES = {'train.seed': 1}" in dry.stdout
    folder = Path(re.search(r"all of it is in (\S+);", dry.stdout)[1])
    assert kaggle_cli(kaggle_server, home, "kernels", "push", "-p", ".", "-t", "32400", cwd=folder).returncode == 0
    assert series_call(kaggle_server, home, *words).returncode == 0
    theirs, ours = kaggle_server.versions
    assert ours == theirs and f"text: {len(ours['text']):,} of 900,000 bytes" in dry.stdout
    shutil.rmtree(folder)


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_every_profile_can_be_pushed_and_its_dry_run_is_what_the_command_line_takes(
    kaggle_server, home, tmp_path, profile
):
    words = ["push", "--profile", profile, "--username", "alice"]
    dry = series_call(kaggle_server, home, *words, "--dry-run", TMPDIR=str(tmp_path))
    assert dry.returncode == 0 and not kaggle_server.received, dry.stderr
    folder = Path(re.search(r"all of it is in (\S+);", dry.stdout)[1])
    hours = load_config(profile).hardware.max_hours
    options = ("-t", str(round((hours + 1) * 3600))) if hours else ()
    theirs = kaggle_cli(kaggle_server, home, "kernels", "push", "-p", ".", *options, cwd=folder)
    assert theirs.returncode == 0 and "successfully pushed" in theirs.stdout, theirs.stderr
    assert series_call(kaggle_server, home, *words).returncode == 0
    by_command_line, ours = kaggle_server.versions
    assert ours == by_command_line and f"PROFILE = {profile!r}" in ours["text"]
    assert ours["enableGpu"] and ours["machineShape"] == "NvidiaTeslaT4" and ours["isPrivate"]
    shutil.rmtree(folder)


def test_an_error_in_the_answer_ends_in_status_1_where_the_command_line_ends_in_0(kaggle_server, home, checkout):
    refusal = Answer({"error": "Maximum batch GPU session count of 2 reached."})
    kaggle_server.script["SaveKernel"] = [refusal, refusal]
    assert kaggle_cli(kaggle_server, home, "kernels", "push", "-p", ".", cwd=checkout).returncode == 0
    done = series_call(kaggle_server, home, "push")
    assert done.returncode == 1 and "Kaggle did not take the push: Maximum batch GPU session count" in done.stderr


def test_sources_that_kaggle_left_out_are_an_error_and_named(kaggle_server, home):
    kaggle_server.script["SaveKernel"] = [Answer({"versionNumber": 3, "invalidDatasetSources": ["alice/gone"]})]
    done = series_call(kaggle_server, home, "push")
    assert done.returncode == 1 and "version 3" in done.stderr and "data sets alice/gone" in done.stderr


def test_a_message_that_the_package_hides_is_shown(kaggle_server, home):
    body = {"error": {"code": 400, "message": "The kernel source must be less than 1 megabytes in size."}}
    kaggle_server.script["SaveKernel"] = [Answer(body, 400)]
    done = series_call(kaggle_server, home, "push")
    assert done.returncode == 1 and "must be less than 1 megabytes" in done.stderr and "Traceback" not in done.stderr


def test_a_rate_limit_is_waited_for_and_the_push_arrives_once(kaggle_server, home):
    kaggle_server.script["SaveKernel"] = [Answer({"code": 429, "message": "slow down"}, 429)] * 2
    done = series_call(kaggle_server, home, "push")
    assert done.returncode == 0 and done.stderr.count("429: slow down; trying again in ") == 2
    assert len(kaggle_server.versions) == 1


@pytest.mark.parametrize(
    "lost",
    [
        {"status": 502, "body": b"<html>Bad Gateway</html>"},
        {"body": b"<html>this is no JSON</html>"},
        {"cut": 0},
    ],
    ids=["5xx", "no JSON", "connection cut"],
)
def test_a_push_whose_answer_was_lost_is_not_repeated_since_it_may_have_arrived(kaggle_server, home, lost):
    kaggle_server.script["SaveKernel"] = [Answer(**lost)]
    done = series_call(kaggle_server, home, "push")
    assert done.returncode == 3 and "Whether the push arrived is not known" in done.stderr
    assert f"https://www.kaggle.com/code/{REFERENCE}" in done.stderr
    assert len(kaggle_server.calls("SaveKernel")) == 1


def _connect(server, monkeypatch):
    """A Kaggle client in this process; the package reads its environment when it is first imported."""
    from utils.kaggle.api import Kaggle

    forget_kaggle()
    return Kaggle(log=lambda _: None)


def test_a_connection_that_falls_silent_is_given_up_and_not_waited_for_without_end(kaggle_server, home, monkeypatch):
    """kagglesdk 0.1.38 sets no time-out at all."""
    from utils.kaggle import api as kaggle_api

    for name, value in kaggle_environment(kaggle_server, home).items():
        monkeypatch.setenv(name, value)
    kaggle = _connect(kaggle_server, monkeypatch)
    assert kaggle.username == "alice"
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(kaggle_api, "TIMEOUT_S", 0.1)
    silence = threading.Event()
    kaggle_server.script["GetKernelSessionStatus"] = [Answer(first=lambda: silence.wait(60))]
    with pytest.raises(kaggle_api.InfrastructureError, match="ReadTimeout"):
        kaggle.status(REFERENCE)
    silence.set()


def test_without_credentials_one_sentence_says_where_to_get_them(kaggle_server, home):
    done = series_call(kaggle_server, home, "push", KAGGLE_USERNAME="", KAGGLE_KEY="", KAGGLE_API_TOKEN="nobodys")
    assert done.returncode == 1 and "no Kaggle credentials" in done.stderr and "kaggle.com/settings" in done.stderr
    assert done.stdout == ""


def test_a_token_is_traded_for_the_user_name(kaggle_server, home):
    (home / ".kaggle").mkdir()
    (home / ".kaggle" / "access_token").write_text("KGAT_of-ours")
    done = series_call(kaggle_server, home, "push", KAGGLE_USERNAME="", KAGGLE_KEY="")
    assert done.returncode == 0, done.stderr
    assert kaggle_server.versions[0]["slug"] == REFERENCE
    assert kaggle_server.calls("SaveKernel")[0].headers["Authorization"] == "Bearer KGAT_of-ours"


def test_waiting_shows_each_state_and_ends_with_the_sessions_own(kaggle_server, home):
    kaggle_server.statuses = [{"status": s} for s in ("complete", "queued", "running", "running", "error")]
    kaggle_server.statuses[-1]["failureMessage"] = "out of memory"
    done = series_call(kaggle_server, home, "push", "--wait", "--poll", "0.01")
    assert done.returncode == 1 and "error: out of memory" in done.stdout
    assert [line.split(" after")[0].split(": ")[1] for line in done.stdout.splitlines() if " after " in line] == [
        "complete", "queued", "running", "error",
    ]  # fmt: skip


class Showing:
    """A Kaggle that shows these states, the last one for ever."""

    def __init__(self, *states: str):
        self.states = list(states)

    def status(self, reference: str) -> tuple[str, str]:
        return (self.states.pop(0) if len(self.states) > 1 else self.states[0]), ""


def test_after_a_push_an_end_counts_only_once_a_session_was_seen(monkeypatch):
    quiet, old = Console(quiet=True), ["complete"] * 9
    ended = push.wait(Showing(*old, "queued", "running", "error"), REFERENCE, quiet, 0.001, just_pushed=True)
    assert ended == ("error", "")
    monkeypatch.setattr(push, "_START_S", 0.05)
    with pytest.raises(InfrastructureError, match=r"no queued or running session of alice/.*the last state: complete"):
        push.wait(Showing("complete"), REFERENCE, quiet, 0.001, just_pushed=True)
    assert push.wait(Showing("error"), REFERENCE, quiet, 0.001) == ("error", "")  # what collect --wait asks


def test_an_outage_in_the_middle_of_waiting_is_waited_out(kaggle_server, home):
    down = Answer({}, 503)
    kaggle_server.statuses = [{"status": "running"}, {"status": "complete"}]
    kaggle_server.script["GetKernelSessionStatus"] = [down] * 7
    done = series_call(kaggle_server, home, "push", "--wait", "--poll", "0.01")
    assert done.returncode == 0 and "unknown" in done.stdout and "complete" in done.stdout


def test_status_and_output_of_the_command_line_work_as_the_readme_says(kaggle_server, home, tmp_path):
    kaggle_server.statuses = [{"status": "error", "failureMessage": "no GPU"}]
    kaggle_server.files, kaggle_server.log = {"runs/t4/manifest.json": b"{}"}, "the log"
    status = kaggle_cli(kaggle_server, home, "kernels", "status", REFERENCE)
    assert status.returncode == 0 and "KernelWorkerStatus.ERROR" in status.stdout and "no GPU" in status.stdout
    output = kaggle_cli(kaggle_server, home, "kernels", "output", REFERENCE, "-p", str(tmp_path / "out"))
    assert output.returncode == 0 and (tmp_path / "out" / "runs" / "t4" / "manifest.json").read_bytes() == b"{}"


def test_the_title_makes_the_slug_by_the_packages_own_rules():
    from slugify import slugify

    metadata = read_metadata()
    assert slugify(metadata["title"]) == metadata["id"].split("/")[1]
    assert title_of(metadata, "medical-lora-2") == "medical lora 2"


def test_kaggle_is_asked_for_the_owner_only_where_nobody_named_one():
    assert find_reference(None, {"id": "carol/some-kernel"}) == "carol/some-kernel"
    assert find_reference(SimpleNamespace(username="bob"), {"id": "OWNER/some-kernel"}, slug="mine") == "bob/mine"


def test_a_notebook_that_is_too_large_for_kaggle_is_refused(monkeypatch):
    """The server's own words for it, "400 Client Error", name no reason."""
    monkeypatch.setattr(bundle, "MAXIMUM_BYTES", 1000)
    with pytest.raises(bundle.ServiceError, match="Kaggle takes less than 1,000"):
        kernel_text()


def test_a_secret_at_hand_is_looked_for_in_what_would_travel(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "import base64, hashlib")
    with pytest.raises(ServiceError, match="take it out: a pushed version cannot be unpushed"):
        kernel_text()


@pytest.mark.parametrize("token", [fake_tokens.hugging_face("x"), fake_tokens.kaggle_token("x")], ids=["hf", "kaggle"])
def test_what_looks_like_a_token_of_any_service_that_is_known_may_not_travel(token):
    with pytest.raises(ServiceError, match="take it out: a pushed version cannot be unpushed") as refused:
        kernel_text("t4", {"model.name": f"someone/{token}"})
    assert token not in str(refused.value)


def test_the_key_in_kaggle_json_may_not_travel(tmp_path, monkeypatch):
    key = fake_tokens.kaggle_key("on disk")
    (tmp_path / "kaggle.json").write_text(json.dumps({"username": "alice", "key": key}))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    _on_disk.cache_clear()
    try:
        with pytest.raises(ServiceError, match="take it out: a pushed version cannot be unpushed"):
            kernel_text("t4", {"model.name": f"someone/{key}"})
    finally:
        _on_disk.cache_clear()


def test_a_wrong_setting_or_a_file_of_this_machine_is_told_before_anything_is_sent(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean train.learning_rate"):
        kernel_text("t4", {"train.learning_rat": 1})
    with pytest.raises(ServiceError, match=r"lies on this machine; attach it to the kernel as a data set"):
        kernel_text("t4", {"data.path": "rows.jsonl"})
    assert "/kaggle/input/rows/rows.jsonl" in kernel_text("t4", {"data.path": "/kaggle/input/rows/rows.jsonl"})


def test_a_typo_is_told_where_the_profile_is_chosen_there_too():
    with pytest.raises(ConfigError, match=r"did you mean train.learning_rate"):
        kernel_text("auto", {"train.learning_rat": 1})
    assert "train.learning_rate" in kernel_text("auto", {"train.learning_rate": 1e-4})


def test_no_setting_may_name_a_file_of_this_machine(tmp_path):
    away = "/kaggle/input/mine/rows.jsonl"
    for key, local, remote in (
        ("model.name", str(tmp_path), "someone/some-model"),
        ("export.base", str(tmp_path), "someone/some-model"),
        ("hardware.accelerate_config", "cluster.yaml", "/kaggle/input/mine/cluster.yaml"),
        ("evaluate.more_benchmarks", [{"name": "a/b"}, {"path": "rows.jsonl"}], [{"name": "a/b"}, {"path": away}]),
        ("evaluate.benchmark", {"path": "rows.jsonl"}, {"path": away}),
    ):
        assert kernel_text("t4", {key: remote})
        with pytest.raises(ServiceError, match=rf"{key}.* lies on this machine"):
            kernel_text("t4", {key: local})
