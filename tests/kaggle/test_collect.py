"""Bringing a kernel's output home: complete, compared with its manifest, classified by exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.loopback import Answer, series_call
from utils.config import load_config
from utils.errors import RunDirError
from utils.files import record_files, write_json
from utils.kaggle.collect import classify, readable_log, run_folder
from utils.pipeline.run_dir import RunDir, SeriesState, write_state
from utils.pipeline.stages import STAGES

REFERENCE = "alice/deepseek-r1-medical-lora"
SENTENCE = "After fine-tuning the model is better."


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def write_run(path: Path, state: str = "done", **more) -> Path:
    """A run directory as a kernel leaves it, with three small outputs on record."""
    path.mkdir(parents=True)
    for name in ("data/train.parquet", "export/adapter/adapter_model.safetensors"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(name.encode() * 1000)
    write_json(path / "comparison" / "metrics.json", {"sentence": SENTENCE, "verdict": "better"})
    outputs = {"00_setup": ("data",), "04_comparison": ("comparison",), "05_export": ("export",)}
    stages = {
        stage.name: {"state": "done", "outputs": record_files(path, outputs.get(stage.name, ()))} for stage in STAGES
    }
    write_json(path / "manifest.json", {"profile": "t4", "stages": stages})
    RunDir(path, load_config("t4")).save()
    write_state(path, SeriesState(state=state, **more))
    return path


def serve(server, run: Path, status: str = "complete", message: str = "") -> None:
    """What `run` holds becomes the output of the server's kernel."""
    server.statuses = [{"status": status, "failureMessage": message}]
    server.files = {f"runs/t4/{p.relative_to(run).as_posix()}": p.read_bytes() for p in run.rglob("*") if p.is_file()}


def collect(server, home, *words: str):
    return series_call(server, home, "collect", REFERENCE, "--run-dir", home / "collected", *words)


def test_a_run_that_passed_comes_home_whole_and_exits_0(kaggle_server, home, tmp_path):
    run = write_run(tmp_path / "run")
    serve(kaggle_server, run)
    kaggle_server.files["notebook_extras/plot.png"] = b"png"
    kaggle_server.page_size = 2  # several pages
    kaggle_server.log = json.dumps([{"stream_name": "stdout", "time": 0.1, "data": "line 1\n"}, {"data": "line 2\n"}])
    done = collect(kaggle_server, home)
    assert done.returncode == 0, done.stderr
    assert f"pass: {SENTENCE}" in done.stdout and "publish" in done.stdout
    here = home / "collected"
    for path in run.rglob("*"):
        assert path.is_dir() or (here / path.relative_to(run)).read_bytes() == path.read_bytes()
    assert (here / "kernel" / "notebook_extras" / "plot.png").read_bytes() == b"png"
    assert (here / "deepseek-r1-medical-lora.log").read_text() == "line 1\nline 2\n"


def test_the_kernel_of_the_metadata_and_a_folder_named_by_it_are_the_defaults(kaggle_server, home, tmp_path):
    serve(kaggle_server, write_run(tmp_path / "run"))
    done = series_call(kaggle_server, home, "collect")
    assert done.returncode == 0, done.stderr
    assert (home / "runs" / "kaggle-deepseek-r1-medical-lora" / "manifest.json").exists()


@pytest.mark.parametrize("status", ["queued", "running"])
def test_a_session_that_goes_on_has_no_outcome_and_exits_3(kaggle_server, home, status):
    kaggle_server.statuses = [{"status": status}]
    done = collect(kaggle_server, home)
    assert done.returncode == 3 and f"has not ended yet ({status})" in done.stdout
    write_run(home / "collected", "continue")  # of an earlier session
    assert "resume it" not in collect(kaggle_server, home).stdout


def test_waiting_first_collects_afterwards(kaggle_server, home, tmp_path):
    serve(kaggle_server, write_run(tmp_path / "run"))
    kaggle_server.statuses = [{"status": "running"}, *kaggle_server.statuses]
    done = collect(kaggle_server, home, "--wait", "--poll", "0.01")
    assert done.returncode == 0 and "running after" in done.stdout


def test_a_series_that_failed_exits_1_with_its_own_sentence(kaggle_server, home, tmp_path):
    run = write_run(
        tmp_path / "run", "failed", stage="03_lora_training", kind="TrainingError", sentence="Loss was not finite."
    )
    serve(kaggle_server, run, "error")
    done = collect(kaggle_server, home)
    assert done.returncode == 1 and "fail: 03_lora_training failed: Loss was not finite." in done.stdout
    assert f"https://www.kaggle.com/code/{REFERENCE}" in done.stdout
    again = "push --continue --username alice --slug deepseek-r1-medical-lora"
    assert "resume it, once that is mended: " in done.stdout and again in done.stdout


def test_a_session_that_lacked_what_the_run_asks_for_is_infrastructure(kaggle_server, home, tmp_path):
    sentence = "needs a CUDA GPU and found none."
    run = write_run(tmp_path / "run", "failed", stage="00_setup", kind="HardwareError", sentence=sentence)
    serve(kaggle_server, run, "error")
    done = collect(kaggle_server, home)
    assert done.returncode == 3 and "needs a CUDA GPU and found none." in done.stdout


def test_a_session_that_ended_itself_in_time_is_to_be_continued(kaggle_server, home, tmp_path):
    run = write_run(tmp_path / "run", "continue", stage="03_lora_training", sentence="this session is 8.0 h old")
    serve(kaggle_server, run)
    done = collect(kaggle_server, home)
    assert (
        done.returncode == 4
        and "to be continued at 03_lora_training" in done.stdout
        and "push --continue" in done.stdout
    )


def test_a_file_that_broke_off_is_fetched_again(kaggle_server, home, tmp_path):
    serve(kaggle_server, write_run(tmp_path / "run"))
    kaggle_server.script["/files/runs/t4/data/train.parquet"] = [
        Answer(b"x" * 5000, cut=100), Answer({}, 500),
    ]  # fmt: skip
    done = collect(kaggle_server, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("fetching the output: ") == 2


def test_an_error_page_is_never_kept_as_a_file(kaggle_server, home, tmp_path):
    """kaggle 2.2.4 by itself writes whatever it is answered into the file."""
    serve(kaggle_server, write_run(tmp_path / "run"))
    kaggle_server.script["/files/runs/t4/data/train.parquet"] = [Answer(b"<Error>expired</Error>", 403)]
    done = collect(kaggle_server, home)
    assert done.returncode == 1 and "403" in done.stderr
    assert not (home / "collected" / "data" / "train.parquet").exists()


def test_an_output_that_is_not_what_the_run_wrote_fails_by_name_and_is_mended_by_collecting_again(
    kaggle_server, home, tmp_path
):
    serve(kaggle_server, write_run(tmp_path / "run"))
    whole = kaggle_server.files["runs/t4/data/train.parquet"]
    kaggle_server.files["runs/t4/data/train.parquet"] = whole[:-1] + b"!"
    done = collect(kaggle_server, home)
    assert done.returncode == 1 and "data/train.parquet differs" in done.stdout
    kaggle_server.files["runs/t4/data/train.parquet"] = whole
    assert collect(kaggle_server, home).returncode == 0


def test_a_name_that_points_outside_is_refused_and_nothing_is_kept(kaggle_server, home, tmp_path):
    serve(kaggle_server, write_run(tmp_path / "run"))
    kaggle_server.files["../../evil.txt"] = b"evil"
    kaggle_server.script["/files/evil.txt"] = kaggle_server.script["/evil.txt"] = [Answer(b"evil")]
    done = collect(kaggle_server, home)
    assert done.returncode == 3 and "points outside" in done.stderr
    assert not list(tmp_path.rglob("evil.txt")) and list((home / "collected").iterdir()) == []


def test_an_earlier_sessions_state_is_not_taken_for_this_ones(kaggle_server, home, tmp_path):
    serve(kaggle_server, write_run(tmp_path / "run"))
    assert collect(kaggle_server, home).returncode == 0
    kaggle_server.files, kaggle_server.log = {}, "Traceback\nModuleNotFoundError: No module named 'torch'\n"
    kaggle_server.statuses = [{"status": "error"}]
    done = collect(kaggle_server, home)
    assert done.returncode == 1 and "ModuleNotFoundError: No module named 'torch'" in done.stdout


def test_a_kernel_of_somebody_else_is_a_sentence(kaggle_server, home):
    kaggle_server.script["GetKernelSessionStatus"] = [Answer({"code": 403, "message": "Permission denied"}, 403)]
    done = collect(kaggle_server, home)
    assert done.returncode == 1 and "check the kernel's name and its owner" in done.stderr


def test_kaggle_that_cannot_be_reached_is_infrastructure(kaggle_server, home):
    kaggle_server.script["GetKernelSessionStatus"] = [Answer(b"<html>", 503, {"Content-Type": "text/html"})] * 6
    done = collect(kaggle_server, home)
    assert done.returncode == 3 and "Kaggle could not be reached" in done.stderr


def test_a_state_that_the_package_does_not_know_is_infrastructure(kaggle_server, home):
    kaggle_server.statuses = [{"status": "hibernating"}]
    done = collect(kaggle_server, home)
    assert done.returncode == 3 and "does not understand" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("status", "log", "outcome", "said"),
    [
        (
            "error",
            "Traceback (most recent call last):\nValueError: This notebook was altered\n",
            "FAIL",
            "notebook was altered",
        ),
        ("error", "HardwareError: The profile t4 needs a CUDA GPU\n", "INFRASTRUCTURE", "needs a CUDA GPU"),
        ("error", "OutOfMemory: One question does not fit into memory\n", "FAIL", "does not fit into memory"),
        ("error", "pulling image\nNo space left on device\n", "INFRASTRUCTURE", "No space left"),
        ("complete", "", "INFRASTRUCTURE", "saved and not run"),
        ("cancel acknowledged", "", "INFRASTRUCTURE", "cancelled"),
    ],
)
def test_a_session_without_a_state_is_classified_by_its_log(tmp_path, status, log, outcome, said):
    collected = classify(status, "", tmp_path, log)
    assert collected.outcome.name == outcome and said in collected.sentence


@pytest.mark.parametrize("state", ["running", None])
def test_a_session_that_ran_out_of_memory_fails_since_another_one_would_too(tmp_path, state):
    """Exit status 3 says "push again", and a user who does so burns quota for ever."""
    run = write_run(tmp_path / "run", state) if state else tmp_path
    told = "Your notebook tried to allocate more memory than is available. It has restarted."
    for message, log in ((told, ""), ("", f"pulling image\n{told}\n")):
        collected = classify("error", message, run, log)
        assert collected.outcome.name == "FAIL" and "memory" in collected.sentence


def test_a_session_that_was_cut_off_in_the_middle_is_infrastructure(tmp_path):
    run = write_run(tmp_path / "run", "running")
    collected = classify("error", "Your notebook exceeded its time limit", run, "")
    assert collected.outcome.name == "INFRASTRUCTURE" and "time limit" in collected.sentence


def test_a_notebook_that_stops_after_the_series_fails(tmp_path):
    run = write_run(tmp_path / "run")
    collected = classify("error", "", run, "…\nKeyError: 'verdict'\n")
    assert collected.outcome.name == "FAIL" and "KeyError: 'verdict'" in collected.sentence


def test_the_log_is_readable_in_both_forms():
    assert readable_log("plain text") == "plain text"
    assert readable_log('[{"data": "a"}, {"data": "b"}]') == "ab"
    assert readable_log("") == ""


def test_the_run_directory_is_found_by_its_manifest(tmp_path):
    def put(*names: str) -> None:
        for name in names:
            write_json(tmp_path / name, {"profile": "t4", "stages": {}})

    write_json(tmp_path / "images/manifest.json", {"pictures": []})
    assert run_folder(tmp_path) is None
    put("mine/lora/manifest.json", "mine/lora/data/manifest.json.bak")  # where RUN_DIR put it
    assert run_folder(tmp_path) == tmp_path / "mine" / "lora"
    put("runs/full/manifest.json")
    with pytest.raises(RunDirError, match="holds 2 runs"):
        run_folder(tmp_path)
