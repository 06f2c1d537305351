"""What a run directory, or whoever hands one in, may hold: manifests, states, answers, records, logs, secrets' files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from utils.sealed import read_lines, to_lines

from tests.faults.fuzzing import VALUES, check_sentence, mutated_bytes, mutated_values, survive, to_json
from tests.staged import complete
from utils import secrets as credentials
from utils.config import load_config
from utils.data.rows import read_benchmark
from utils.evaluation.questions import Question, answer_key, current_answers, matching_answers, read_forced
from utils.evaluation.results import read_sentence
from utils.export.hub import plan_uploads
from utils.export.verify import export_folders
from utils.files import write_json
from utils.kaggle.attach import find_attached, move_large_files
from utils.kaggle.collect import Outcome, _classify_by_log, classify, readable_log
from utils.pipeline.run_dir import altered_files, open_run, read_manifest, require_recorded
from utils.pipeline.stages import BY_NAME, STAGES
from utils.pipeline.state import SeriesState, read_state, write_state


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of small text files, and its manifest without a seal, as people write one."""
    path = tmp_path_factory.mktemp("finished") / "run"
    complete(path)
    write_json(path / "manifest.json", read_manifest(path))
    return path


@pytest.fixture
def here(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def check_manifest(path: Path) -> None:
    manifest, _ = survive(read_manifest, path)
    survive(find_attached, "auto", path.parent)
    if manifest is None:
        return
    assert set(manifest.get("stages", ())) <= {stage.name for stage in STAGES}
    for record in manifest.get("stages", {}).values():
        for name in (*record.get("inputs", {}), *record.get("outputs", {})):
            assert (path / name).resolve().is_relative_to(path.resolve()), "a file outside would be read"
    survive(altered_files, path)
    survive(plan_uploads, path, "you/adapter")
    survive(require_recorded, path, ("data", "baseline"))
    collected, _ = survive(classify, "COMPLETE", "", path, "")
    check_sentence(collected.sentence)
    run, _ = survive(open_run, "auto", path)
    if run is not None:
        survive(run.first_stale, STAGES)
        survive(run.out_of_date, BY_NAME["05_export"])
        survive(run.save)


def test_a_damaged_manifest_ends_in_a_sentence_or_is_one(here, fuzz):
    seed = (here / "manifest.json").read_bytes()

    def check(data: bytes) -> None:
        (here / "manifest.json").write_bytes(data)
        check_manifest(here)

    write_state(here, SeriesState(state="done"))
    fuzz.run("manifests: bytes", 400, mutated_bytes([seed]), check)


def test_a_manifest_of_another_shape_ends_in_a_sentence_or_is_one(here, fuzz):
    seed = json.loads((here / "manifest.json").read_bytes())
    few = {**seed, "stages": {name: seed["stages"][name] for name in ("00_setup", "05_export")}}

    def check(value) -> None:
        (here / "manifest.json").write_bytes(to_json(value))
        check_manifest(here)

    write_state(here, SeriesState(state="done"))
    fuzz.run("manifests: values", 500, mutated_values([few]), check)


def test_a_state_of_any_kind_is_none_or_is_told_in_a_sentence(here, fuzz):
    state = SeriesState(
        state="continue", stage="03_lora_training", sentence="later", left_in_scratch={"export/merged": 3}
    )

    def check(value) -> None:
        (here / "state.json").write_bytes(to_json(value))
        found, _ = survive(read_state, here)
        assert found is None or isinstance(found, SeriesState)
        for status in ("COMPLETE", "ERROR"):
            collected, _ = survive(classify, status, "", here, "")
            assert isinstance(collected.outcome, Outcome)
        survive(altered_files, here)
        survive(move_large_files, here)

    fuzz.run("states: values", 500, mutated_values([state.model_dump(mode="json")]), check)


def test_a_damaged_state_is_none_or_one_that_can_be_read(here, fuzz):
    state = SeriesState(state="failed", stage="03_lora_training", sentence="It failed.", started=1.5)
    write_state(here, state)
    seed = (here / "state.json").read_bytes()

    def check(data: bytes) -> None:
        (here / "state.json").write_bytes(data)
        found, _ = survive(read_state, here)
        assert found is None or isinstance(found, SeriesState)

    fuzz.run("states: bytes", 800, mutated_bytes([seed]), check)


CONFIG = load_config("demo").generate
QUESTIONS = [
    Question("a", "open", "Why 医?"),
    Question("7", "choice", "Which?"),
    Question("anecdote", "anecdote", "How?"),
]
ANSWERS = [
    {"id": q.id, "kind": q.kind, "key": answer_key(q, CONFIG, "arm"), "text": f"hm {q.id}\n</think>\n\nIt is **B**.\u2028 医🩺", "tokens": 9,
     "reasoning_tokens": 3, "finish_reason": "stop"} for q in QUESTIONS
]  # fmt: skip
ITEMS = pd.DataFrame(
    [{"id": "7", "benchmark": "medqa", "question": "?", "options": {"A": "x", "B": "y"}, "gold": "B", "group": "7"}]
)


def test_damaged_answers_are_whole_ones_or_missing_ones(tmp_path, fuzz):
    path = tmp_path / "answers.jsonl"
    seed = to_lines(ANSWERS).encode()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        rows, _ = survive(read_lines, path)
        assert all(row in ANSWERS for row in rows)
        answers, sentence = survive(current_answers, path, QUESTIONS, CONFIG, "arm")
        assert (answers is None) == bool(sentence)
        if answers is not None:
            assert answers == {answer["id"]: answer for answer in ANSWERS}

    fuzz.run("answers: bytes", 900, mutated_bytes([seed]), check)


def test_lines_of_any_shape_are_no_answers_and_are_counted_as_missing(tmp_path, fuzz):
    path = tmp_path / "answers.jsonl"
    keys = {answer["id"]: answer["key"] for answer in ANSWERS}

    def check(value) -> None:
        rows = [row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict)]
        try:
            path.write_text(to_lines(rows), encoding="utf-8")
        except UnicodeEncodeError:  # half a character: no file can hold it
            return
        answers, _ = survive(matching_answers, path, keys)
        for identifier, answer in answers.items():
            assert answer["id"] == identifier and answer["key"] == keys[identifier] and type(answer["text"]) is str
        survive(read_forced, path, {answer["id"]: answer for answer in ANSWERS}, ITEMS)

    fuzz.run("answers: values", 800, mutated_values([ANSWERS]), check)


VERIFY = {
    "folders": {"adapter": "export/adapter", "merged": "/tmp/elsewhere/merged"},
    "tolerances": {"exact, largest": 1e-4},
    "agreement": {"adapter": {"identical": 2}},
}  # fmt: skip


def test_a_record_of_exports_of_any_shape_ends_in_a_sentence_or_a_list(here, fuzz):
    run = open_run("demo", here)

    def check(value) -> None:
        run.file("export/verify.json").write_bytes(to_json(value))
        survive(export_folders, run)

    fuzz.run("records of exports: values", 800, mutated_values([VERIFY]), check)


def test_a_damaged_record_of_exports_ends_in_a_sentence_or_a_list(here, fuzz):
    run = open_run("demo", here)

    def check(data: bytes) -> None:
        run.file("export/verify.json").write_bytes(data)
        survive(export_folders, run)

    fuzz.run("records of exports: bytes", 500, mutated_bytes([to_json(VERIFY)]), check)


def _metrics() -> dict:
    from tests.exported import result

    lengths = {
        "reasoning_tokens_mean": 9.0,
        "reasoning_tokens_median": 9.0,
        "answer_tokens_mean": 3.0,
        "truncated": 0.1,
    }
    registration = {"primary": "nll", "open_questions": 1, "choice_questions": 0, "questions_sha256": "0", "decoding": {},
                    "seed": 1, "changed_after_answers": False}  # fmt: skip
    return {
        "profile": "demo", "primary": result("nll", 0.5, 0.4, -0.2, 0.0), "secondary": [result("accuracy", 0.5, 0.6, 0.0, 0.2)],
        "form": {"base": {}, "tuned": {}}, "length": {"base": lengths, "tuned": lengths}, "nll_rows_left_out": 0,
        "contamination": {"threshold": 0.5}, "registration": registration, "verdict": "cannot tell", "sentence": "It cannot be told.",
        "claims": [{"claim": "keeps form", "metric": None, "verdict": "cannot tell", "sentence": "It was not measured."}],
    }  # fmt: skip


def test_metrics_of_any_shape_end_in_a_sentence_or_tell_theirs(tmp_path, fuzz):
    (tmp_path / "comparison").mkdir()
    file = tmp_path / "comparison" / "metrics.json"

    def check(value) -> None:
        file.write_bytes(to_json(value))
        sentence, _ = survive(read_sentence, tmp_path)
        if sentence is not None:
            assert sentence == json.loads(file.read_bytes())["sentence"]

    fuzz.run("metrics: values", 800, mutated_values([_metrics()]), check)


def test_a_benchmark_file_of_the_run_ends_in_a_sentence_or_its_items(here, fuzz):
    """Frozen by 00; whoever reads it without the manifest gets a sentence all the same."""

    def check(data: bytes) -> None:
        (here / "data/benchmark.jsonl").write_bytes(data)
        survive(read_benchmark, here / "data")

    fuzz.run("frozen items: bytes", 400, mutated_bytes([ITEMS.to_json(orient="records", lines=True).encode()]), check)


LOG = [
    {"stream_name": "stdout", "time": 1.0, "data": "00 done\n"},
    {"stream_name": "stderr", "time": 2, "data": "ValueError: no\n"},
]


def test_a_kernels_log_of_any_shape_is_read_as_text_and_classified(fuzz):
    def check(data: bytes) -> None:
        text, _ = survive(readable_log, data.decode("utf-8", "surrogateescape"))
        assert type(text) is str
        for status in ("COMPLETE", "ERROR"):
            collected, _ = survive(_classify_by_log, status, "", text)
            assert collected.outcome in tuple(Outcome)

    fuzz.run(
        "kernels' logs: bytes", 500, mutated_bytes([to_json(LOG), b"Traceback\nkagglesdk.X.RunDirError: no\n"]), check
    )


def test_a_kernels_log_of_other_values_is_read_as_text(fuzz):
    def check(value) -> None:
        assert type(survive(readable_log, json.dumps(value))[0]) is str

    fuzz.run("kernels' logs: values", 400, mutated_values([LOG]), check)


def test_a_file_of_secrets_of_any_kind_gives_a_secret_or_says_why_not(tmp_path, monkeypatch, fuzz):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(credentials, "ROOT", tmp_path)
    for name in credentials.NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(credentials, "os", SimpleNamespace(environ={}))

    def check(data: bytes) -> None:
        (tmp_path / ".env").write_bytes(data)
        secret, _ = survive(credentials.find_secret, "HF_TOKEN")
        if secret.value:
            assert secret.value.isprintable() and secret.value.isascii() and secret.value == secret.value.strip()

    seeds = [b"HF_TOKEN=hf_abcdef\nWANDB_API_KEY='0123'\n# a remark\nexport KAGGLE_KEY=\"x y\"\n", b"HF_TOKEN=${X}\n"]
    fuzz.run("files of secrets: bytes", 400, mutated_bytes(seeds), check)


def test_any_value_can_be_sealed_and_read_back(tmp_path, fuzz):
    path = tmp_path / "rows.jsonl"

    def check(value) -> None:
        try:
            path.write_text(to_lines([{"value": value}]), encoding="utf-8")
        except UnicodeEncodeError:
            return
        (row,) = read_lines(path)
        assert json.dumps(row) == json.dumps({"value": value})

    fuzz.run("sealed lines: values", 400, VALUES, check)
