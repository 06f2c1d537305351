"""What a reader, an editor or another program may hand in: a sentence, or exactly what it holds; never a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from hypothesis import strategies as st

from tests.faults.fuzzing import (
    NASTY,
    VALUES,
    cases,
    check_sentence,
    corpus,
    mutated_bytes,
    mutated_values,
    survive,
    to_json,
)
from tests.staged import complete
from utils import config as config_module
from utils import secrets
from utils.config import load_config, parse_overrides
from utils.data.benchmarks import load_items
from utils.data.rows import COLUMNS, check_rows, read_table
from utils.evaluation.questions import Question, answer_key, current_answers
from utils.export.merge import INDEX, find_shards
from utils.export.places import export_folders
from utils.files import read_lines, write_lines
from utils.kaggle import push
from utils.kaggle.collect import Outcome, classify
from utils.kaggle.push import find_reference, read_metadata, title_of
from utils.pipeline.run_dir import RunDir, SeriesState, altered_files, open_run, read_manifest, read_state
from utils.pipeline.stages import STAGES
from utils.project import PROFILES
from utils.schema import BenchmarkSection, Config

WRITERS = {
    ".jsonl": lambda rows, path: path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"),
    ".json": lambda rows, path: path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8"),
    ".csv": lambda rows, path: pd.DataFrame(rows).to_csv(path, index=False),
    ".parquet": lambda rows, path: pd.DataFrame(rows).to_parquet(path, index=False),
}


def seeds(area: str, suffix: str) -> list[bytes]:
    return [path.read_bytes() for path in corpus(area, f"*{suffix}")]


# Rows


def read_rows(path: Path) -> pd.DataFrame:
    return check_rows(read_table(path), path.name)


def check_data_file(path: Path) -> None:
    frame = survive(read_rows, path)
    if frame is None:
        return
    assert len(frame) and set(COLUMNS) <= set(frame.columns)
    found = frame[list(COLUMNS)].to_dict("records")
    for cell in (cell for row in found for cell in row.values()):
        assert type(cell) is str and cell.strip() == cell and cell
    if path.suffix in (".json", ".jsonl"):  # as the plainest reader sees them
        text = path.read_text(encoding="utf-8-sig")
        plain = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.split("\n") if x.strip()]
        assert found == [{column: row[column].strip() for column in COLUMNS} for row in plain]


@pytest.mark.parametrize("suffix", WRITERS)
@cases(200, data=st.data())
def test_a_damaged_data_file_ends_in_a_sentence_or_its_rows(suffix, tmp_path, fault, data):
    fault(f"data files, {suffix[1:]}")
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(data.draw(mutated_bytes(*seeds("rows", suffix))))
    check_data_file(path)


@cases(
    300,
    rows=mutated_values(
        [{"Question": q, "Complex_CoT": "hm", "Response": "so", "group": "a"} for q in ("Why 医?", "How?")]
    ),
)
def test_rows_of_another_shape_end_in_a_sentence_or_as_they_are(tmp_path, fault, rows):
    fault("data files of another shape")
    (tmp_path / "rows.json").write_bytes(to_json(rows))
    check_data_file(tmp_path / "rows.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "gb18030"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@cases(20, text=st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=12))
def test_another_encoding_is_read_right_or_refused_and_never_guessed(suffix, encoding, tmp_path, fault, text):
    fault("encodings")
    path, row = tmp_path / f"rows{suffix}", dict.fromkeys(COLUMNS, text)
    WRITERS[suffix]([row], path)
    path.write_bytes(path.read_bytes().decode().encode(encoding, "ignore"))
    frame = survive(read_rows, path)
    if frame is not None and encoding.startswith("utf-8"):
        assert frame[list(COLUMNS)].to_dict("records") == [dict.fromkeys(COLUMNS, text.strip())]


# Benchmarks

SCHEMAS = {
    "medqa": [{"id": "a", "question": "Which?", "options": {"A": "Iron", "B": "Zinc"}, "answer_idx": "B"},
              {"id": "b", "question": "Where?", "options": {"A": "Left", "B": "Right"}, "answer_idx": "A"}],
    "medmcqa": [{"question": f"Which {i}?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": i} for i in range(4)],
    "pubmedqa": [{"pubid": 1, "question": "Does it?", "context": {"contexts": ["One."]}, "final_decision": "yes"},
                 {"pubid": 2, "question": "Is it?", "context": {"contexts": []}, "final_decision": "no"}],
}  # fmt: skip


def check_benchmark(path: Path) -> None:
    items = survive(load_items, BenchmarkSection(path=path))
    for item in () if items is None else items.itertuples():
        assert type(item.question) is str and item.question.strip()
        assert len(item.options) >= 2 and all(re.fullmatch("[A-Z]", letter) for letter in item.options)
        assert all(type(text) is str and text.strip() for text in item.options.values())
        assert item.gold in item.options
    assert items is None or items["id"].is_unique


@pytest.mark.parametrize("suffix", WRITERS)
@cases(100, data=st.data())
def test_a_damaged_benchmark_file_ends_in_a_sentence_or_its_items(suffix, tmp_path, fault, data):
    fault("benchmark files")
    path = tmp_path / f"items{suffix}"
    path.write_bytes(data.draw(mutated_bytes(*seeds("items", suffix))))
    check_benchmark(path)


@pytest.mark.parametrize("schema", SCHEMAS)
@cases(150, data=st.data())
def test_items_of_another_shape_end_in_a_sentence_or_can_be_asked(schema, tmp_path, fault, data):
    fault("benchmark files of another shape")
    (tmp_path / "items.json").write_bytes(to_json(data.draw(mutated_values(SCHEMAS[schema]))))
    check_benchmark(tmp_path / "items.json")


# Settings


def keys(values, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration, sections too."""
    below = values.items() if isinstance(values, dict) else ()
    return [key for name, value in below for key in (f"{prefix}{name}", *keys(value, f"{prefix}{name}."))]


KEYS = keys(load_config("t4").model_dump())
ODD = ["", ".", "..", "profile", "model.", ".model", "lora.r.r", "train..seed", "a\nb", "x" * 300]
NAMES = st.sampled_from(KEYS) | st.sampled_from(KEYS).map(lambda key: f"{key}.x") | st.sampled_from(ODD) | st.text()
SETTING = st.sampled_from(NASTY) | VALUES
WORDS = st.text(max_size=20) | st.sampled_from([
    "*x", "!!python/object/apply:os.system [ls]", "{a: 1, a: 2}", "2024-99-99", "1_000", "1:30", ".inf", ".nan", "~", "yes", "'", "|", ">",
    "%", "@", "a: b: c", "!!binary x", "<<: 3", "!!set {a}", "? a", "\t", "!!int ''",
])  # fmt: skip


def check_config(config: Config | None) -> None:
    if config is not None:
        assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config and config.model_dump_json()


@pytest.mark.parametrize("profile", ["demo", "full"])
@cases(200, overrides=st.dictionaries(NAMES, SETTING, min_size=1, max_size=2) | SETTING)
def test_overrides_of_any_kind_end_in_a_sentence_or_a_valid_configuration(profile, fault, overrides):
    fault("settings: OVERRIDES")
    check_config(survive(load_config, profile, overrides))


@cases(300, assignments=st.lists(WORDS | st.tuples(NAMES, WORDS).map("=".join), min_size=1, max_size=2))
def test_every_set_option_ends_in_a_sentence_or_a_valid_configuration(fault, assignments):
    fault("settings: --set")
    overrides = survive(parse_overrides, assignments)
    if overrides is not None:
        check_config(survive(load_config, "demo", overrides))


PROFILE_FILES = [path.read_bytes() for path in sorted(PROFILES.glob("*.yaml"))]


@cases(200, text=mutated_bytes(*PROFILE_FILES))
def test_a_damaged_profile_ends_in_a_sentence_or_a_valid_configuration(tmp_path, fault, text, monkeypatch):
    fault("settings: profiles")
    monkeypatch.setattr(config_module, "PROFILES", tmp_path)
    (tmp_path / "odd.yaml").write_bytes(text)
    check_config(survive(load_config, "odd"))


# A run directory, handed in


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of small text files, its own manifest kept as whole.json; tests overwrite the other one."""
    path = tmp_path_factory.mktemp("finished") / "run"
    complete(path)
    (path / "whole.json").write_bytes((path / "manifest.json").read_bytes())
    return path


@cases(300, data=st.data())
def test_a_manifest_of_another_shape_ends_in_a_sentence_or_is_one(finished, fault, data):
    fault("manifests")
    whole = json.loads((finished / "whole.json").read_bytes())
    few = {**whole, "stages": {name: whole["stages"][name] for name in ("00_setup", "05_export")}}
    (finished / "manifest.json").write_bytes(data.draw(mutated_values(few).map(to_json) | mutated_bytes(to_json(few))))
    manifest = survive(read_manifest, finished)
    for record in (manifest or {}).get("stages", {}).values():
        for name in (*record.get("inputs", {}), *record.get("outputs", {})):
            assert (finished / name).resolve().is_relative_to(finished.resolve()), "a file outside would be read"
    if manifest is not None:
        survive(altered_files, finished)
        check_sentence(classify("complete", "", finished, "").sentence)
        run = survive(open_run, "auto", finished)
        survive(run.first_stale, STAGES) if run else None


STATE = SeriesState(state="continue", stage="03_lora_training", sentence="later")


@cases(200, state=mutated_values(STATE.model_dump(mode="json")).map(to_json) | mutated_bytes(b'{"state": "done"}'))
def test_a_state_of_any_kind_is_none_or_is_told_in_a_sentence(tmp_path, fault, state):
    fault("states")
    (tmp_path / "state.json").write_bytes(state)
    assert isinstance(survive(read_state, tmp_path), SeriesState | None)
    assert isinstance(survive(classify, "complete", "", tmp_path, "").outcome, Outcome)


GENERATE = load_config("demo").generate
QUESTIONS = [Question("a", "open", "Why 医?"), Question("7", "choice", "Which?")]
ANSWERS = [
    {"id": q.id, "kind": q.kind, "key": answer_key(q, GENERATE, "base"), "text": f"hm\n</think>\n\nIt is **B**.\u2028 {q.id}🩺",
     "tokens": 9, "reasoning_tokens": 3, "finish_reason": "stop"} for q in QUESTIONS
]  # fmt: skip


@cases(300, data=st.data())
def test_answers_cut_off_anywhere_are_whole_ones_or_missing_ones(tmp_path, fault, data):
    """What a kill leaves; a finished file is held to its digest."""
    fault("answers")
    path = tmp_path / "answers.jsonl"
    write_lines(path, ANSWERS)
    path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size))])
    assert [row for row in read_lines(path) if row not in ANSWERS] == []
    assert (survive(current_answers, path, QUESTIONS, GENERATE, "base") is None) == (len(read_lines(path)) < 2)


# Models, secrets, Kaggle


@cases(200, text=mutated_bytes(b"HF_TOKEN=hf_abcdef\nWANDB_API_KEY='0123'\n# a remark\nexport KAGGLE_KEY=\"x y\"\n"))
def test_a_file_of_secrets_of_any_kind_gives_a_secret_that_can_be_sent_or_none(tmp_path, monkeypatch, fault, text):
    fault("files of secrets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(secrets, "ROOT", tmp_path)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_bytes(text)
    value = survive(secrets.find_secret, "HF_TOKEN").value
    assert not value or (value.isprintable() and value.isascii() and value == value.strip())


NOBODY = SimpleNamespace(username="alice")
METADATA = [
    json.loads(corpus("metadata", name)[0].read_bytes()) for name in ("kernel-metadata.json", "with-sources.json")
]


@cases(300, value=mutated_values(*METADATA))
def test_metadata_of_another_shape_end_in_a_sentence_or_a_submission(tmp_path, monkeypatch, fault, value):
    fault("kernel metadata")
    monkeypatch.setattr(push, "METADATA", tmp_path / "kernel-metadata.json")
    push.METADATA.write_bytes(to_json(value))
    metadata = survive(read_metadata)
    reference = survive(find_reference, NOBODY, metadata) if metadata else None
    if reference:
        assert reference.count("/") == 1
        survive(title_of, metadata, reference.split("/")[1])


# Every input that once ended in a traceback: who reads each area of the corpus, and under which name


def read_profile(folder: Path) -> Config:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_module, "PROFILES", folder)
        return load_config("odd")


READERS = {
    "manifests": ("manifest.json", read_manifest),
    "exports": ("export/verify.json", lambda folder: export_folders(RunDir(folder, load_config("demo")))),
    "indices": (INDEX, find_shards),
    "metadata": ("kernel-metadata.json", lambda folder: find_reference(NOBODY, read_metadata(), "alice")),
    "config": ("odd.yaml", read_profile),
    "rows": ("", check_data_file),
    "items": ("", check_benchmark),
}
SOUND = ("kernel-metadata.json", "with-sources.json", "key-twice.yaml")  # these say nothing wrong
CASES = [(area, path) for area in READERS for path in corpus(area)]


@pytest.mark.parametrize(("area", "path"), CASES, ids=[f"{area}/{path.name}" for area, path in CASES])
def test_a_file_of_the_corpus_ends_in_a_sentence_or_is_read_right(area, path, tmp_path, monkeypatch, fault):
    fault(f"found before: {area}")
    name, read = READERS[area]
    monkeypatch.setattr(push, "METADATA", tmp_path / name)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(path, tmp_path / (name or path.name))
    found = survive(read, tmp_path if name else path)
    assert not name or (found is None) == (path.name not in SOUND)


@pytest.mark.parametrize("path", corpus("secrets"), ids=lambda path: path.name)
def test_a_secret_that_could_not_be_sent_is_none(path, tmp_path, monkeypatch, fault):
    fault("found before: secrets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(secrets, "ROOT", tmp_path)
    for name in ("HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in secrets.NAMES["HF_TOKEN"]:
        monkeypatch.delenv(name, raising=False)
    shutil.copy(path, tmp_path / ".env")
    assert secrets.find_secret("HF_TOKEN").value is None
