"""Each file of a finished run, damaged in five ways: found before it is used, named, and its stage offered again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from utils.sealed import read_lines

from tests.conftest import run_command
from tests.faults.damage import KINDS, UNRECORDED, damage, damaged
from tests.faults.fuzzing import check_sentence
from utils.__main__ import score
from utils.errors import HubError, RunDirError, StageOrderError
from utils.export.hub import plan_uploads, read_verdict
from utils.kaggle.bundle import build_kernel
from utils.kaggle.collect import Outcome, classify
from utils.pipeline.run_dir import RunDir, altered_files, open_run, read_manifest
from utils.pipeline.stage import open_stage
from utils.pipeline.stages import BY_NAME, STAGES, Stage, ancestors
from utils.pipeline.state import read_state
from utils.report.index import write_report
from utils.training.train import find_checkpoint

OPENS = {"score": (*BY_NAME["04_comparison"].inputs[:-1], "tuned"), "publish": ("export/adapter",)}


@pytest.fixture(scope="module")
def work(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy that every test damages and mends again."""
    return Path(shutil.copytree(small_run, tmp_path_factory.mktemp("corruption") / "run"))


@pytest.fixture(scope="module")
def makers(work: Path) -> dict[str, Stage]:
    """{file: the stage that makes it}, of all that is on record."""
    stages = read_manifest(work)["stages"]
    return {name: BY_NAME[stage] for stage, record in stages.items() for name in record["outputs"]}


def files_of(path: Path) -> list[str]:
    found = (p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file())
    return [name for name in found if not Path(name).name.startswith(".")]


def is_below(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place.rstrip('/')}/") for place in places)


def sentence_of(error: pytest.ExceptionInfo) -> str:
    check_sentence(str(error.value))
    return str(error.value)


def test_every_file_is_on_record_or_it_is_decided_what_a_damaged_one_means(work, makers):
    for name in files_of(work):
        assert name in makers or is_below(name, tuple(UNRECORDED)), (
            f"{name}: put it on record, or say in damage.py why not"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_stage_made_and_was_damaged_is_named_and_the_stage_offered_again(work, makers, kind, recording):
    with recording(f"a file {kind}", tried=len(makers)) as counts:
        for name, maker in makers.items():
            with damaged(work / name, kind):
                _found_by_the_run(open_run("auto", work), name, maker)
                _found_by_the_others(work, name, maker)
            counts.survived += 1
    assert open_run("auto", work).first_stale(STAGES) is None  # the tests themselves left nothing


def _found_by_the_run(run: RunDir, name: str, maker: Stage) -> None:
    """`run` does that stage again, and a notebook opened by hand after it refuses to begin."""
    stage, reason = run.first_stale(STAGES)
    assert stage == maker and name in reason
    assert run.stale_because(maker) == reason  # also with the notebook in view, as the driver asks
    behind = next((stage for stage in STAGES if maker in ancestors(stage)), None)
    if behind is not None:
        before = run.manifest_path.read_bytes()
        with pytest.raises(StageOrderError) as error:
            open_stage(behind.name, "auto", run.path)
        told = sentence_of(error)
        assert name in told and maker.name in told and run.manifest_path.read_bytes() == before


def _found_by_the_others(path: Path, name: str, maker: Stage) -> None:
    """verify, collect, score and publish name it; whoever does not read it is not stopped by it."""
    assert [line.split()[0] for line in altered_files(path)] == [name]
    collected = classify("COMPLETE", "", path, "")
    assert collected.outcome == Outcome.FAIL and name in collected.sentence
    check_sentence(collected.sentence)
    if is_below(name, OPENS["score"]):
        with pytest.raises(RunDirError) as error:
            score(path)
        assert name in sentence_of(error) and maker.name in str(error.value)
    if is_below(name, OPENS["publish"]):
        with pytest.raises(HubError) as error:
            plan_uploads(path, "you/adapter")
        assert name in sentence_of(error) and maker.name in str(error.value)
    if name == "comparison/metrics.json":
        with pytest.raises(RunDirError) as error:
            read_verdict(path)
        assert name in sentence_of(error) and maker.name in str(error.value)


@pytest.mark.parametrize("kind", ["truncated", "emptied", "deleted"])
def test_a_damaged_manifest_is_refused_by_name_or_is_no_run_directory(work, kind, recording):
    before = {name: (work / name).read_bytes() for name in files_of(work) if name != "manifest.json"}
    with recording(f"a file {kind}", tried=1) as counts:
        with damaged(work / "manifest.json", kind):
            if kind == "deleted":  # the directory of a run that has not begun: every stage is to do
                assert open_run("demo", work).first_stale(STAGES) == (STAGES[0], "it has not run")
                reads = (lambda: open_stage("03_lora_training", "demo", work), lambda: score(work))
            else:
                reads = (
                    lambda: open_run("auto", work),
                    lambda: open_stage("03_lora_training", "auto", work),
                    lambda: score(work),
                )
            for read in reads:
                with pytest.raises((RunDirError, StageOrderError)) as error:
                    read()
                told = sentence_of(error)
                assert "manifest.json" in told or (kind == "deleted" and "needs 00_setup, but it has not run" in told)
        assert before == {name: (work / name).read_bytes() for name in files_of(work) if name != "manifest.json"}
        counts.survived = counts.tried


def test_no_single_bit_of_a_saved_answer_can_turn_over_unseen(work, tmp_path, recording):
    whole = (work / "baseline/answers.jsonl").read_bytes()
    path = tmp_path / "answers.jsonl"
    path.write_bytes(whole)
    answers = read_lines(path)
    with recording("a bit of a saved answer") as counts:
        for place in range(0, len(whole), max(1, len(whole) // 400)):
            counts.tried += 1
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
            found = read_lines(path)
            assert len(answers) - 2 <= len(found) and all(answer in answers for answer in found), place
            counts.survived += 1


@pytest.mark.parametrize("kind", ["truncated", "emptied", "deleted"])
def test_a_checkpoint_that_was_not_finished_is_passed_over_and_named(work, kind, capsys, recording):
    (folder,) = (work / "training/checkpoints").iterdir()
    last = Path(find_checkpoint(folder))
    with recording(f"a checkpoint's last file {kind}", tried=2) as counts:
        for name in ("trainer_state.json", "rng_state.pth"):
            with damaged(last / name, kind):
                found = find_checkpoint(folder)
                assert found is not None and found != str(last), name
                assert f"{last.name} was not finished" in capsys.readouterr().out
            counts.survived += 1
        assert find_checkpoint(folder) == str(last)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_leaves_out_what_was_damaged(work, kind, tmp_path, recording):
    """Also where `run` was told to stop before the stage that would make it anew."""
    sources = ("comparison/metrics.json", "comparison/table.csv", "comparison/comparison.png", "data/split.json",
               "environment.json", "training/loss.png", "report/notebooks/04_comparison.ipynb")  # fmt: skip
    path = Path(shutil.copytree(work, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "merged")))
    with recording("the report's sources damaged", tried=len(sources)) as counts:
        for name in sources:
            damage(path / name, kind)
        page = write_report(open_run("auto", path)).read_text(encoding="utf-8")
        assert "Verdict:" not in page and page.count("<img") == 1
        assert ("04_comparison.html" in page) == (
            kind in ("bit-flipped", "of another run")
        )  # nobody has that one on record
        counts.survived = counts.tried


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_never_read_back_is_written_anew(work, kind, tmp_path, recording):
    path = Path(shutil.copytree(work, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "merged")))
    before = (path / "config.yaml").read_bytes()
    with recording("a file that is never read back, damaged", tried=2) as counts:
        damage(path / "config.yaml", kind)
        damage(path / "state.json", kind)
        assert read_state(path) is None
        open_run("auto", path).save()
        assert (path / "config.yaml").read_bytes() == before
        counts.survived = counts.tried


@pytest.fixture
def again(work: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that a real run may go on with; what it has on record is that of the undisturbed run."""
    yield Path(shutil.copytree(work, tmp_path / "again"))


def test_a_real_run_redoes_the_damaged_stages_and_comes_to_the_same_results(again, recording):
    recorded = {stage: record["outputs"] for stage, record in read_manifest(again)["stages"].items()}
    damage(again / "data/formatted/train.parquet", "emptied")
    damage(again / "tuned/answers.jsonl", "bit-flipped")
    for name in ("report/notebooks/03_lora_training.ipynb", "state.json", "config.yaml"):
        damage(again / name, "truncated")
    answers = len(read_lines(again / "tuned/answers.jsonl"))
    with recording("a real run over damaged files", tried=2) as counts:
        done = run_command("score", again)
        assert (
            done.returncode == 1
            and "RunDirError: tuned/answers.jsonl differs from what 04_comparison wrote" in done.stderr
        )
        done = run_command("run", "--run-dir", again)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "again, because one of its outputs changed (data/formatted/train.parquet differs" in done.stdout
        assert "again, because one of its outputs changed (tuned/answers.jsonl differs" in done.stdout
        assert done.stdout.count("unchanged, not run again") == 4
        after = read_manifest(again)["stages"]
        order = lambda path: sorted(json.dumps(row, sort_keys=True) for row in read_lines(path))  # noqa: E731
        assert len(order(again / "tuned/answers.jsonl")) == answers + 1
        for stage, outputs in recorded.items():
            for name, entry in outputs.items():
                if name != "tuned/answers.jsonl":  # the one answer that was given again stands last in it
                    assert after[stage]["outputs"][name]["sha256"] == entry["sha256"], name
        counts.survived = counts.tried


def test_the_bundles_unpacked_folder_is_made_whole_each_time(tmp_path, recording):
    (cell,) = [c for c in build_kernel().cells if c.cell_type == "code" and "ARCHIVE = " in c.source]
    file = tmp_path / "unpack.py"
    file.write_text(cell.source, encoding="utf-8")
    unpack = lambda: Path(  # noqa: E731
        subprocess.run(
            [sys.executable, str(file)], env={"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        .stdout.strip()
        .splitlines()[-1]
    )
    root = unpack()
    whole = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for kind, path in zip(KINDS, sorted(whole), strict=False):
        damage(path, kind)
    with recording("the bundle's unpacked files damaged", tried=len(KINDS) + 1) as counts:
        assert unpack() == root and {path: path.read_bytes() for path in whole} == whole
        altered = nbformat.from_dict(cell).source.replace('ARCHIVE = """\nUEs', 'ARCHIVE = """\nUEt')
        file.write_text(altered, encoding="utf-8")
        with pytest.raises(subprocess.CalledProcessError) as error:
            unpack()
        assert "its archive does not match its checksum" in error.value.stderr
        counts.survived = counts.tried
