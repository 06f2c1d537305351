"""Files of a finished run, damaged in five ways: found before they are used, named, and their stage offered again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import run_command
from tests.faults.fuzzing import check_sentence
from utils.__main__ import score
from utils.errors import RunDirError, ServiceError
from utils.export.hub import plan_uploads, read_verdict
from utils.files import read_lines
from utils.kaggle.collect import Outcome, classify
from utils.pipeline.run_dir import altered_files, open_run, read_manifest, read_state
from utils.pipeline.stage import open_stage
from utils.pipeline.stages import BY_NAME, STAGES, Stage, ancestors
from utils.report.index import write_report

KINDS = ("truncated", "emptied", "bit-flipped", "deleted", "of another run")
# What no stage has on record, and what a damaged one means.
UNRECORDED = {
    "manifest.json": "refused by whatever opens the run directory, where it is no manifest any more",
    "state.json": "a damaged one counts as none, and the next run writes it",
    "config.yaml": "refused where it is no configuration any more; a change of it is a change of settings",
    "report/": "written anew after each stage; of the executed notebooks a damaged one is left out",
    "training/checkpoints/": "a torn one is passed over: tests/training",
    "training/recipe.py": "written anew by 03 before it is read",
    "training/launch.log": "never read back",
    "tracking/": "never read back; `publish` hands it to wandb, which says what it cannot read",
}
READ_BY = {"score": (*BY_NAME["04_comparison"].inputs[:-1], "tuned"), "publish": ("export/adapter",)}


def damage(path: Path, kind: str) -> None:
    """Damage one file in place, its time kept, and its size where the kind allows it."""
    data, stat = path.read_bytes(), path.stat()
    middle = len(data) // 2
    changed = {
        "truncated": data[: len(data) * 2 // 3] if data else b"\n",
        "emptied": b"" if data else b"{}\n",
        "bit-flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"\x01",
        "of another run": of_another_run(path, data) if kind == "of another run" else b"",
    }
    if kind == "deleted":
        path.unlink()
        return
    path.write_bytes(changed[kind])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def of_another_run(path: Path, data: bytes) -> bytes:
    """A valid file of the same kind with other content."""
    if path.suffix == ".parquet":
        return pd.read_parquet(path).iloc[::-1].reset_index(drop=True).to_parquet(index=False)
    if path.suffix == ".json":
        value = json.loads(data)
        other = [*value, "of another run"] if isinstance(value, list) else {**value, "of": "another run"}
        return json.dumps(other).encode()
    lines = data.splitlines(keepends=True)
    return b"".join(reversed(lines)) if path.suffix == ".jsonl" and len(lines) > 1 else data + b"\n"


@contextmanager
def damaged(path: Path, kind: str) -> Iterator[None]:
    """`path` damaged inside the block, and as it was after it, time included."""
    data, stat = path.read_bytes(), path.stat()
    damage(path, kind)
    try:
        yield
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture(scope="module")
def work(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy that every test damages and mends again."""
    return Path(shutil.copytree(small_run, tmp_path_factory.mktemp("damaged") / "run"))


@pytest.fixture(scope="module")
def makers(work: Path) -> dict[str, Stage]:
    """{file: the stage that makes it}, of all that is on record."""
    stages = read_manifest(work)["stages"]
    return {name: BY_NAME[stage] for stage, record in stages.items() for name in record["outputs"]}


def is_below(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place.rstrip('/')}/") for place in places)


def told(kind: type[Exception] | tuple, function, *arguments) -> str:
    """The sentence that the call ends in."""
    with pytest.raises(kind) as error:
        function(*arguments)
    check_sentence(str(error.value))
    return str(error.value)


def test_every_file_is_on_record_or_it_is_decided_what_a_damaged_one_means(work, makers):
    for path in work.rglob("*"):
        name = path.relative_to(work).as_posix()
        if path.is_file() and not path.name.startswith("."):
            assert name in makers or is_below(name, tuple(UNRECORDED)), f"{name}: put it on record, or say here why not"


def test_a_damaged_output_is_named_and_its_stage_offered_again(work, makers, fault, long):
    cases = [
        (name, kind) for i, name in enumerate(sorted(makers)) for j, kind in enumerate(KINDS) if long or i % 5 == j
    ]
    for name, kind in cases:
        fault(f"an output {kind}")
        maker = makers[name]
        with damaged(work / name, kind):
            found_by_the_run(work, name, maker)
            found_by_the_others(work, name, maker)
    assert open_run("auto", work).first_stale(STAGES) is None  # the tests themselves left nothing


def found_by_the_run(work: Path, name: str, maker: Stage) -> None:
    """`run` does that stage again, and a notebook opened by hand after it refuses to begin."""
    run = open_run("auto", work)
    stage, reason = run.first_stale(STAGES)
    assert stage == maker and name in reason
    behind = next((stage for stage in STAGES if maker in ancestors(stage)), None)
    if behind is not None:
        before = run.manifest_path.read_bytes()
        sentence = told(RunDirError, open_stage, behind.name, "auto", work)
        assert name in sentence and maker.name in sentence and run.manifest_path.read_bytes() == before


def found_by_the_others(work: Path, name: str, maker: Stage) -> None:
    """verify, collect, score and publish name it; whoever does not read it is not stopped by it."""
    assert [line.split()[0] for line in altered_files(work)] == [name]
    collected = classify("complete", "", work, "")
    assert collected.outcome == Outcome.FAIL and name in collected.sentence
    check_sentence(collected.sentence)
    refused = [told(RunDirError, score, work)] if is_below(name, READ_BY["score"]) else []
    refused += (
        [told((ServiceError, RunDirError), plan_uploads, work, "you/adapter")]
        if is_below(name, READ_BY["publish"])
        else []
    )
    refused += [told(RunDirError, read_verdict, work)] if name == "comparison/metrics.json" else []
    assert all(name in sentence and maker.name in sentence for sentence in refused)


@pytest.mark.parametrize("kind", ["truncated", "emptied", "deleted"])
def test_a_damaged_manifest_is_refused_by_name_or_is_no_run_directory(work, kind, fault):
    fault(f"the manifest {kind}")
    with damaged(work / "manifest.json", kind):
        if kind == "deleted":  # the directory of a run that has not begun: every stage is to do
            assert open_run("demo", work).first_stale(STAGES) == (STAGES[0], "it has not run")
            assert "needs 00_setup, but it has not run" in told(
                RunDirError, open_stage, "03_lora_training", "demo", work
            )
        else:
            for read in (
                lambda: open_run("auto", work),
                lambda: open_stage("03_lora_training", "auto", work),
                lambda: score(work),
            ):
                assert "manifest.json" in told(RunDirError, read)


def test_the_report_leaves_out_what_was_damaged(work, tmp_path, fault):
    """Also where `run` was told to stop before the stage that would make it anew."""
    sources = ("comparison/metrics.json", "comparison/table.csv", "comparison/comparison.png", "data/split.json",
               "environment.json", "training/loss.png", "report/notebooks/04_comparison.ipynb")  # fmt: skip
    fault("the report's sources truncated", tried=len(sources))
    path = Path(shutil.copytree(work, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "merged")))
    for name in (*sources, "state.json"):
        damage(path / name, "truncated")
    page = write_report(open_run("auto", path)).read_text(encoding="utf-8")
    assert "Verdict:" not in page and page.count("<img") == 1 and "04_comparison.html" not in page
    assert read_state(path) is None


def test_a_real_run_redoes_the_damaged_stages_and_comes_to_the_same_results(work, tmp_path, fault):
    fault("a real run over damaged files", tried=2)
    again = Path(shutil.copytree(work, tmp_path / "again"))
    recorded = {stage: record["outputs"] for stage, record in read_manifest(again)["stages"].items()}
    damage(again / "data/formatted/train.parquet", "emptied")
    damage(again / "tuned/answers.jsonl", "truncated")
    for name in ("report/notebooks/03_lora_training.ipynb", "state.json"):
        damage(again / name, "truncated")
    done = run_command("score", again)
    sentence = "RunDirError: tuned/answers.jsonl differs from what 04_comparison wrote"
    assert done.returncode == 1 and sentence in done.stderr, done.stderr
    done = run_command("run", "--run-dir", again)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "again, because one of its outputs changed (data/formatted/train.parquet differs" in done.stdout
    assert "again, because one of its outputs changed (tuned/answers.jsonl differs" in done.stdout
    assert done.stdout.count("unchanged, not run again") == 4
    after = read_manifest(again)["stages"]
    for stage, outputs in recorded.items():
        for name, entry in outputs.items():
            if name != "tuned/answers.jsonl":  # the answers that were given again stand last in it
                assert after[stage]["outputs"][name]["sha256"] == entry["sha256"], name
    assert {row["id"]: row for row in read_lines(again / "tuned/answers.jsonl")} == {
        row["id"]: row for row in read_lines(work / "tuned/answers.jsonl")
    }
