"""Settings that nobody should have given: a sentence, or a configuration that is valid and survives its own YAML."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from tests.faults.fuzzing import NASTY, VALUES, corpus, mutated_bytes, survive
from utils import config as config_module
from utils.config import absolute_overrides, load_config, parse_overrides, profile_names
from utils.data.rows import read_table
from utils.kaggle.push import kernel_text, session_hours
from utils.pipeline.run_dir import open_run
from utils.pipeline.stages import STAGES
from utils.project import PROFILES
from utils.schema import Config
from utils.training import launch


def keys(values: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration, sections too."""
    if not isinstance(values, dict):
        return []
    found = []
    for name, value in values.items():
        found += [f"{prefix}{name}", *keys(value, f"{prefix}{name}.")]
    return found


KEYS = keys(load_config("t4").model_dump())
ODD_KEYS = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(KEYS).map(lambda key: key[:-1]),
    st.sampled_from(KEYS).map(lambda key: f"{key}.x"),
    st.sampled_from(
        ["", ".", "..", "profile", "model.", ".model", "lora.r.r", "train..seed", "\ud800", "a\nb", "x" * 3000]
    ),
    st.text(max_size=8),
)


def has_whole_characters(value: Any) -> bool:
    """Whether a file can hold `value`: no half of a character, no null byte."""
    return "\\ud8" not in repr(value) and "\\x00" not in repr(value)


VALUE = st.one_of(st.sampled_from(NASTY), VALUES).filter(has_whole_characters)
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from([
        "&a [*a, *a]", "*x", "!!python/object/apply:os.system [ls]", "{a: 1, a: 2}", "[" * 400, "{a: " * 400, "- " * 400, "2024-99-99",
        "0x1F", "1_000", "1e3", "1:30", ".inf", ".nan", "~", "yes", "'", '"', "|", ">", "%", "@", "`", "\x00", "\x85", "a: b: c", "!!binary x",
        "!!timestamp 2024-13-01", "<<: 3", "!!set {a}", "? a", "\t", "-" * 400, "9" * 5000, "!<tag:yaml.org,2002:int> x", "!!int ''",
    ]),
)  # fmt: skip
PATHS = st.sampled_from(
    ["~nobody-of-that-name/x", "~", "x" * 300, "x" * 5000, "x/" * 3000, "/proc/self/mem/x", ".", "", "x.json/y"]
)


def check_config(config: Config) -> None:
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config
    assert config.model_dump_json()


@pytest.mark.parametrize("profile", profile_names())
def test_settings_of_any_name_and_value_end_in_a_sentence_or_a_valid_configuration(profile, fuzz):
    def check(overrides: dict) -> None:
        config, _ = survive(load_config, profile, overrides)
        if config is not None:
            check_config(config)

    fuzz.run("settings: names and values", 300, st.dictionaries(ODD_KEYS, VALUE, min_size=1, max_size=2), check)


def test_what_is_no_mapping_of_settings_gets_a_sentence(fuzz):
    def check(overrides: Any) -> None:
        config, _ = survive(load_config, "demo", overrides)
        if config is not None:
            check_config(config)

    fuzz.run("settings: OVERRIDES of another type", 300, VALUE, check)


def test_every_set_option_ends_in_a_sentence_or_a_valid_configuration(fuzz):
    def check(assignments: list[str]) -> None:
        overrides, _ = survive(parse_overrides, assignments)
        if overrides is not None:
            config, _ = survive(load_config, "demo", overrides)
            if config is not None:
                check_config(config)

    assignment = st.one_of(
        WORDS, st.tuples(ODD_KEYS, WORDS).map("=".join), st.tuples(st.sampled_from(KEYS), VALUE.map(repr)).map("=".join)
    )
    fuzz.run("settings: --set", 800, st.lists(assignment, min_size=1, max_size=2), check)


def test_settings_end_in_a_sentence_before_a_run_directory_is_touched_or_are_kept_in_it(tmp_path, fuzz):
    def check(overrides: dict) -> None:
        place = tmp_path / "run"
        run, _ = survive(open_run, "demo", place, overrides)
        if run is None:
            assert not place.exists()
            return
        for stage in STAGES:
            survive(run.settings, stage)
        if run.config.data.path is not None:
            survive(read_table, run.config.data.path)
        survive(run.save)
        assert open_run("auto", place).config == run.config
        shutil.rmtree(place)

    fuzz.run(
        "settings: kept in a run directory",
        400,
        st.dictionaries(st.sampled_from(KEYS), st.one_of(VALUE, PATHS), max_size=2),
        check,
    )


def test_a_run_directory_of_any_name_ends_in_a_sentence_or_a_path(tmp_path, monkeypatch, fuzz):
    monkeypatch.chdir(tmp_path)

    def check(name: str) -> None:
        run, _ = survive(open_run, "demo", name)
        assert run is None or run.path.is_absolute()

    names = st.one_of(
        st.text(max_size=12), PATHS, st.sampled_from([value for value in NASTY if isinstance(value, str)])
    ).filter(has_whole_characters)
    fuzz.run("settings: names of a run directory", 300, names, check)
    assert not list(tmp_path.iterdir())  # opening writes nothing


def test_settings_that_would_travel_to_kaggle_get_a_sentence_or_travel(fuzz, monkeypatch):
    monkeypatch.setattr("utils.kaggle.bundle._materialise", lambda: "")  # 0.1 s each, and it has its own tests

    def check(overrides: dict) -> None:
        survive(kernel_text, "t4", overrides)
        survive(lambda: session_hours(load_config("t4", overrides)))

    fuzz.run("settings: pushed", 60, st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=2), check)


def test_local_paths_in_settings_are_made_absolute_or_left(fuzz):
    def check(overrides: dict) -> None:
        survive(lambda: load_config("demo", overrides) and load_config("demo", absolute_overrides(overrides)))

    names = st.sampled_from(
        ["data.path", "model.name", "export.base", "evaluate.more_benchmarks", "evaluate.benchmark.path"]
    )
    paths = st.one_of(VALUE, PATHS)
    values = st.one_of(paths, st.lists(st.fixed_dictionaries({"path": paths}), max_size=2))
    fuzz.run("settings: paths", 400, st.dictionaries(names, values, min_size=1, max_size=3), check)


@pytest.mark.parametrize("path", corpus("config"), ids=lambda path: path.name)
def test_every_profile_of_the_corpus_ends_in_a_sentence_or_a_valid_configuration(path, tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "PROFILES", tmp_path)
    shutil.copy(path, tmp_path / "odd.yaml")
    config, _ = survive(load_config, "odd")
    if config is not None:
        check_config(config)


def test_a_damaged_profile_ends_in_a_sentence_or_a_valid_configuration(tmp_path, fuzz, monkeypatch):
    seeds = [
        path.read_bytes()
        for path in (*sorted(PROFILES.glob("*.yaml")), *corpus("config"))
        if path.stat().st_size < 3000
    ]
    monkeypatch.setattr(config_module, "PROFILES", tmp_path)

    def check(data: bytes) -> None:
        (tmp_path / "odd.yaml").write_bytes(data)
        config, _ = survive(load_config, "odd")
        if config is not None:
            check_config(config)

    fuzz.run("settings: damaged profiles", 700, mutated_bytes(seeds), check)


def test_a_damaged_configuration_of_accelerate_ends_in_a_sentence_or_a_number(tmp_path, fuzz):
    path = tmp_path / "machine.yaml"
    seed = b"compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 4\n"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        count, _ = survive(launch._processes_in, Path(path))
        assert count is None or (type(count) is int and count > 0)

    fuzz.run("settings: damaged accelerate configurations", 500, mutated_bytes([seed]), check)
