"""Longer than one session: what is pushed after what, when it stops, and that the result is that of one long run."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.conftest import run_command
from tests.kaggle.test_collect import serve, write_run
from tests.loopback import Answer, KaggleServer, Received, series_call, series_cli
from tests.sessions import Machine
from utils.config import load_config
from utils.errors import InfrastructureError, KaggleError
from utils.kaggle.sessions import continuation, until_done
from utils.pipeline.run_dir import RunDir
from utils.pipeline.runner import checkpointed_steps
from utils.pipeline.state import read_state

REFERENCE = "alice/deepseek-r1-medical-lora"


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_continue_attaches_the_last_output_and_keeps_the_runs_own_profile(kaggle_server, home, tmp_path):
    run = write_run(tmp_path / "run", "continue", stage="03_lora_training", steps=50)
    RunDir(run, load_config("full", {"hardware.max_hours": 5})).save()
    serve(kaggle_server, run)
    done = series_call(kaggle_server, home, "push", "--continue")
    assert done.returncode == 0, done.stderr
    (body,) = kaggle_server.versions
    assert body["kernelDataSources"] == [REFERENCE] and body["sessionTimeoutSeconds"] == 6 * 3600
    assert 'PROFILE = "auto"' in body["text"].replace('\\"', '"')  # the attached run knows its own


@pytest.mark.parametrize("state", ["done", "failed", None])
def test_there_has_to_be_something_to_continue(kaggle_server, home, tmp_path, state):
    if state:
        serve(kaggle_server, write_run(tmp_path / "run", state))
    done = series_call(kaggle_server, home, "push", "--continue")
    assert done.returncode == 1 and "nothing to go on with; push without --continue" in done.stderr
    assert not kaggle_server.versions


def test_a_source_that_kaggle_does_not_attach_stops_the_chain(kaggle_server, home, tmp_path):
    serve(kaggle_server, write_run(tmp_path / "run", "continue", stage="03_lora_training"))
    kaggle_server.script["SaveKernel"] = [Answer({"versionNumber": 2, "invalidKernelSources": [REFERENCE]})]
    done = series_call(kaggle_server, home, "push", "--continue", "--until-done", "--poll", "0.01")
    assert done.returncode == 1 and f"kernels {REFERENCE}" in done.stderr


class Scripted:
    """A Kaggle whose sessions end as `ends` says: (stage, steps), or None for done."""

    def __init__(self, ends: list, monkeypatch, earlier=None):
        self.ends, self.pushed, self.earlier = iter(ends), [], earlier
        monkeypatch.setattr("utils.kaggle.sessions.push", self._push)
        monkeypatch.setattr("utils.kaggle.sessions.wait", lambda *_, just_pushed: ("COMPLETE", ""))
        monkeypatch.setattr("utils.kaggle.sessions.peek", self._peek)

    def _push(self, kaggle, request):
        from utils.kaggle.push import Pushed

        self.pushed.append(request)
        return Pushed(REFERENCE, len(self.pushed), "https://…")

    def _peek(self, kaggle, reference):
        from utils.pipeline.state import SeriesState

        config = load_config("full")
        if not self.pushed:
            return self.earlier, config
        end, started = next(self.ends), float(len(self.pushed))
        if end is None:
            return SeriesState(state="done", started=started), config
        return SeriesState(state="continue", stage=end[0], steps=end[1], sentence="8 h", started=started), config


def chain(ends, monkeypatch, sessions=6, earlier=None):
    scripted = Scripted(ends, monkeypatch, earlier)
    first = SimpleNamespace(slug=REFERENCE, name="first")
    state = until_done(
        None,
        first,
        lambda config: SimpleNamespace(name=f"next of {config.profile}"),
        Console(quiet=True),
        sessions,
    )
    return state, [request.name for request in scripted.pushed]


def test_sessions_follow_each_other_until_one_is_done(monkeypatch):
    ends = [("03_lora_training", 50), ("03_lora_training", 120), ("04_comparison", 120), None]
    state, pushed = chain(ends, monkeypatch)
    assert state.state == "done" and pushed == ["first", *["next of full"] * 3]


def test_a_run_that_stands_still_is_not_pushed_a_third_time(monkeypatch):
    with pytest.raises(KaggleError, match="Two sessions in a row ended at 03_lora_training, step 50"):
        chain([("03_lora_training", 50)] * 9, monkeypatch)


def test_the_output_from_before_the_push_is_not_taken_for_the_new_sessions(monkeypatch):
    from utils.pipeline.state import SeriesState

    with pytest.raises(InfrastructureError, match="still the one from before version 1"):
        chain([None], monkeypatch, earlier=SeriesState(state="done", started=1.0))
    state, _ = chain([None], monkeypatch, earlier=SeriesState(state="done", started=0.5))
    assert state.state == "done"


def test_a_kernel_that_does_not_exist_yet_has_no_earlier_output(kaggle_server, home, tmp_path):
    denied = Answer({"code": 403, "message": "Permission 'kernels.get' was denied"}, 403)
    kaggle_server.script["ListKernelSessionOutput"] = [denied]
    serve(kaggle_server, write_run(tmp_path / "run", started=5.0))
    kaggle_server.statuses = [{"status": s} for s in ("queued", "running", "complete")]
    done = series_call(kaggle_server, home, "push", "--until-done", "--poll", "0.01")
    assert done.returncode == 0 and "the last session ended as done" in done.stdout, done.stderr


def test_there_is_a_limit_to_how_many_sessions_are_started(monkeypatch):
    with pytest.raises(KaggleError, match="not done after 2 sessions; go on with push --continue --until-done"):
        chain([("03_lora_training", 50 * n) for n in range(1, 9)], monkeypatch, sessions=2)


def test_the_last_sessions_state_is_read_without_its_other_files(kaggle_server, home, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", "continue", stage="03_lora_training", steps=50)
    serve(kaggle_server, run)
    done = series_call(kaggle_server, home, "push", "--continue", "--dry-run")
    assert done.returncode == 0 and not kaggle_server.versions, done.stderr
    fetched = sorted(Path(call.path).name for call in kaggle_server.calls("/files/"))
    assert fetched == ["config.yaml", "state.json"]
    assert f'kernelDataSources: ["{REFERENCE}"]' in done.stdout
    assert continuation.__doc__


def test_the_newest_checkpoint_says_how_far_a_training_came(tmp_path):
    assert checkpointed_steps(tmp_path) == 0
    for name in ("abc/checkpoint-60", "abc/checkpoint-120", "abc/checkpoint-120.tmp", "def/checkpoint-9"):
        (tmp_path / "training" / "checkpoints" / name).mkdir(parents=True)
    assert checkpointed_steps(tmp_path) == 120


@pytest.mark.series
def test_a_session_whose_time_is_up_ends_after_the_stage_at_hand_and_the_next_goes_on(tmp_path, embedded_model):
    words = ["run", "--profile", "demo", "--run-dir", tmp_path / "run", "--to", "02"]
    first = run_command(*words, "--set", "hardware.max_hours=0.0001")
    assert (
        first.returncode == 4 and "to be continued at 01_baseline_inference: this session is 0.0 h old" in first.stdout
    )
    state = read_state(tmp_path / "run")
    assert (state.state, state.stage, state.kind) == ("continue", "01_baseline_inference", "SessionOver")
    second = run_command(*words)
    assert second.returncode == 4 and second.stdout.count("unchanged") == 1
    assert read_state(tmp_path / "run").stage == "02_dataset_formatting"
    assert read_state(tmp_path / "run").started > state.started > 1.7e9


class WorkingKaggle(KaggleServer):
    """A Kaggle that runs what it is pushed, on a new machine each time, with the last output attached where asked for."""

    def __init__(self, root: Path, model: Path):
        super().__init__()
        self.root, self.model = root, model
        self.layouts = ("notebooks/alice/deepseek-r1-medical-lora", "deepseek-r1-medical-lora")

    def _SaveKernel(self, request: Received) -> Answer:
        answer = super()._SaveKernel(request)
        machine = Machine(self.root / f"s{len(self.versions)}", self.model)
        if request.json.get("kernelDataSources"):
            machine.attach(self.files, self.layouts[len(self.versions) % 2])
        self.session = threading.Thread(
            target=lambda: machine.hand_output_to(self, machine.execute(request.json["text"]))
        )
        self.session.start()
        return answer

    def _GetKernelSessionStatus(self, request: Received) -> Answer:
        if self.session.is_alive():
            return Answer({"status": "running"})
        return super()._GetKernelSessionStatus(request)


SMALL = {
    "data.train_rows": 192, "data.eval_rows": 32, "train.num_train_epochs": 1, "generate.max_new_tokens": 64,
    "evaluate.resamples": 1000, "export.prompts": 2,
}  # fmt: skip


@pytest.mark.series
def test_a_chain_of_short_sessions_ends_in_the_adapter_of_one_long_run_bit_for_bit(
    tmp_path, tmp_path_factory, home, embedded_model
):
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    long = run_command("run", "--profile", "demo", "--run-dir", tmp_path / "long", *settings)
    assert long.returncode == 0, long.stdout + long.stderr
    server = WorkingKaggle(tmp_path_factory.mktemp("m"), embedded_model)  # short: a kernel's socket lies below
    try:
        words = [
            "push",
            "--profile",
            "demo",
            *settings,
            "--set",
            "hardware.max_hours=0.012",
            "--until-done",
            "--sessions",
            "24",
        ]
        done = series_cli(server, home, *words, "--poll", "0.5", timeout=800)
    finally:
        server.close()
    assert done.returncode == 0, done.stdout + done.stderr + server.log[-3000:]
    assert 2 <= len(server.versions) <= 24  # a slow machine takes more
    attached = [version.get("kernelDataSources", []) for version in server.versions]
    assert attached == [[], *[[REFERENCE]] * (len(server.versions) - 1)]
    collected = home / "runs" / "kaggle-deepseek-r1-medical-lora"
    for name in ("export/adapter/adapter_model.safetensors", "comparison/metrics.json", "baseline/answers.jsonl"):
        assert (collected / name).read_bytes() == (tmp_path / "long" / name).read_bytes(), name
