"""Settings: every profile loads, the tutorial's numbers are the published ones, and a wrong value gets one sentence."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from utils import config as config_module
from utils.config import (
    absolute_overrides,
    differing_settings,
    load_config,
    parse_overrides,
    profile_names,
    read_config,
)
from utils.errors import ConfigError
from utils.export.adapter import sixteen_bit_source
from utils.project import PROFILES
from utils.schema import Config


def edit_config(config: Config, overrides: dict) -> Config:
    """What a run's config.yaml becomes by a later `--set`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(config.to_yaml(), encoding="utf-8")
        return read_config(file, overrides)


def refusal(profile: str = "demo", **overrides) -> str:
    """The message of the ConfigError that these overrides (`a__b` for `a.b`) get; it must be one line that ends."""
    with pytest.raises(ConfigError) as caught:
        load_config(profile, {key.replace("__", "."): value for key, value in overrides.items()})
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?", ".)")) and len(message) < 400
    return message


def header(name: str) -> list[str]:
    """The comment lines that open a profile's file."""
    lines = (PROFILES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


ON_ONE_GPU = ("full", "local24", "t4", "t4-quick", "tutorial")


def test_the_seven_profiles_exist():
    assert profile_names() == sorted(["demo", "smollm2", *ON_ONE_GPU])


@pytest.mark.parametrize("name", ON_ONE_GPU)
def test_a_profile_for_a_gpu_loads_the_small_model_in_whichever_half_precision_the_gpu_has(name):
    config = load_config(name)
    assert config.model.name.endswith("-unsloth-bnb-4bit") and config.hardware.dtype == "auto"
    assert sixteen_bit_source(config)[0] == "unsloth/DeepSeek-R1-Distill-Llama-8B"


@pytest.mark.parametrize("name", [name for name in ON_ONE_GPU if name != "local24"])
def test_a_profile_for_kaggle_ends_its_session_before_kaggle_does(name):
    assert load_config(name).hardware.max_hours <= 8


def test_the_quick_profile_is_short_enough_for_one_t4():
    """At 300 tokens trained and 80 answered in a second, the slowest that a T4 is expected to be, in minutes."""
    config = load_config("t4-quick")
    train, answers = config.train, config.evaluate.questions + config.evaluate.benchmark.rows
    training = train.max_steps * train.rows_per_update * config.model.max_seq_length / 300 / 60
    assert (config.data.train_rows, train.max_steps, config.evaluate.benchmark.rows) == (500, 60, 100)
    assert training < 15 and answers * config.generate.max_new_tokens / 80 / 60 < 25


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_loads_and_survives_its_own_yaml(name):
    config = load_config(name)
    assert config.profile == name
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_carries_its_launch_command_and_an_override_that_works(name):
    commands = [line.lstrip("# ").split("#")[0].split() for line in header(name) if "python -m utils" in line]
    assert f"python -m utils run --profile {name}".split() in commands
    assignments = [words[words.index("--set") + 1] for words in commands if "--set" in words]
    assert assignments
    for assignment in assignments:
        assert load_config(name, parse_overrides([assignment])) != load_config(name)


def test_the_tutorial_profile_has_the_published_numbers():
    config = load_config("tutorial")
    lora, train, data = config.lora, config.train, config.data
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 16, 0)
    assert lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (data.name, data.subset) == ("FreedomIntelligence/medical-o1-reasoning-SFT", "en")
    assert data.train_rows == 500
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (2, 4)
    assert (train.max_steps, train.warmup_steps) == (60, 5)
    assert (train.learning_rate, train.lr_scheduler_type) == (2e-4, "linear")
    assert (train.optim, train.weight_decay, train.seed) == ("adamw_8bit", 0.01, 3407)
    assert (train.loss_on, train.packing) == ("all", False)
    assert (config.prompt.style, config.generate.max_new_tokens) == ("tutorial", 1200)
    assert (config.model.max_seq_length, config.model.load_in_4bit) == (2048, True)


def test_the_demo_profile_needs_no_gpu_and_no_network():
    config = load_config("demo")
    assert (config.hardware.device, config.model.name) == ("cpu", "embedded")
    assert config.embedded_data and not config.evaluate.benchmark.wanted


@pytest.mark.parametrize("name", profile_names())
def test_data_from_the_hub_is_pinned_to_a_revision(name):
    data = load_config(name).data
    assert data.name == "embedded" or len(data.revision) == 40


def test_a_profile_has_the_size_of_its_device_and_an_override_wins():
    on_cpu = load_config("smollm2", {"hardware.device": "cpu", "data.eval_rows": 7})
    on_gpu = load_config("smollm2", {"hardware.device": "cuda", "data.eval_rows": 7})
    assert on_cpu.data.train_rows < on_gpu.data.train_rows and on_cpu.data.eval_rows == on_gpu.data.eval_rows == 7
    assert on_cpu.lora == on_gpu.lora and on_cpu.generate == on_gpu.generate


def test_what_a_profile_says_for_a_cpu_is_validated(tmp_path, monkeypatch):
    write_profile(tmp_path, monkeypatch, b"model: {name: x}\nhardware: {device: cpu}\non_cpu: {train: {max_step: 3}}\n")
    with pytest.raises(ConfigError, match="did you mean train"):
        load_config("mine")


def test_a_config_cannot_be_changed_after_validation():
    with pytest.raises(ValidationError, match="frozen"):
        load_config("demo").train.max_steps = 3


def test_an_override_changes_its_key_and_nothing_else():
    before, after = load_config("demo").model_dump(), load_config("demo", {"train.max_steps": 7}).model_dump()
    assert after["train"].pop("max_steps") == 7 and before["train"].pop("max_steps") is None
    assert after == before


def test_an_unknown_profile_is_refused_with_the_list_of_those_that_exist():
    with pytest.raises(
        ConfigError, match=r"There is no profile 'dmo'; there are demo, full, local24, smollm2, t4, t4-quick, tutorial."
    ):
        load_config("dmo")


def test_an_unknown_key_is_refused_with_a_suggestion():
    assert refusal(train__max_step=3) == "train.max_step is not a setting; did you mean train.max_steps?"
    assert "did you mean evaluate.benchmark.rows?" in refusal(evaluate__benchmark__row=3)


def test_an_unknown_key_without_a_near_one_is_refused_with_the_known_keys():
    assert (
        refusal(lora__zzz=3)
        == "lora.zzz is not a setting; known are r, lora_alpha, lora_dropout, target_modules, use_rslora."
    )
    assert "quux is not a setting; known are model, data, prompt," in refusal(quux=1)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train.max_steps", "many", "integer"),
        ("train.max_steps", 1.5, "integer"),
        ("train.max_steps", -1, "greater than or equal to 0"),
        ("lora.r", 0, "greater than 0"),
        ("lora.lora_dropout", 1.0, "less than 1"),
        ("train.learning_rate", math.nan, "finite"),
        ("train.learning_rate", 2, "less than or equal to 1"),
        ("data.eval_rows", 0, "greater than 0"),
        ("data.shuffle_answers", "perhaps", "boolean"),
        ("generate.top_p", 0, "greater than 0"),
        ("evaluate.primary", "rouge", "'accuracy'"),
        ("evaluate.resamples", 10, "greater than or equal to 1000"),
        ("evaluate.questions", 0, "greater than 0"),
        ("train.optim", "nonsense", "adamw_8bit"),
        ("prompt.style", "alpaca", "'auto', 'native', 'chat' or 'tutorial'"),
        ("hardware.device", "tpu", "'cuda'"),
        ("lora.target_modules", [], "at least 1"),
        ("train", 5, "dictionary"),
        ("evaluate", 5, "dictionary"),
        ("evaluate", "abc", "dictionary"),
        ("evaluate", [1], "dictionary"),
        ("evaluate.benchmark", 3, "dictionary"),
    ],
)
def test_a_wrong_type_or_range_is_refused_with_key_value_and_what_is_allowed(key, value, allowed):
    message = refusal(**{key: value})
    assert message.startswith(f"{key} is {value!r}: ") and allowed in message


def test_overrides_stay_as_they_were_given():
    """Found by `make faults`: a section given whole and one of its keys given beside it was changed where the reader had it."""
    section = {"max_steps": 3}
    config = load_config("demo", {"train": section | {"learning_rate": 0.1}, "train.max_steps": 7})
    assert (config.train.max_steps, config.train.learning_rate) == (7, 0.1)
    with pytest.raises(ConfigError):
        load_config("demo", {"train": section, "train.x": section})
    assert section == {"max_steps": 3}


def test_the_other_problems_are_counted():
    assert refusal(lora__r=0, train__max_steps=-1).endswith("(1 more problem(s) of this kind.)")


def test_a_key_below_a_value_is_refused():
    assert refusal("tutorial", train__max_steps__x=1) == (
        "train.max_steps.x goes through max_steps, which is a value and not a section."
    )


def test_the_profile_itself_cannot_be_overridden_since_the_run_directory_would_name_another():
    with pytest.raises(ConfigError, match="profile is no setting"):
        load_config("demo", {"profile": "full"})


@pytest.mark.parametrize("overrides", ["train.max_steps=3", ["train.max_steps"], 3])
def test_overrides_that_are_no_mapping_are_refused(overrides):
    with pytest.raises(ConfigError, match=r"OVERRIDES is .* not a mapping such as"):
        load_config("demo", overrides)


@pytest.mark.parametrize("assignment", ["train.max_steps", "", "=5", " =5"])
def test_an_assignment_without_key_or_sign_is_refused(assignment):
    with pytest.raises(ConfigError, match=r"is not KEY=VALUE; write for example --set train.max_steps=10."):
        parse_overrides([assignment])


def test_assigned_values_are_read_as_yaml():
    given_ = ["a.b=3", "c=true", "d=null", "e=[q_proj, v_proj]", "f=x=y", " g =1.5", "h=", "i=[half"]
    assert parse_overrides(given_) == {
        "a.b": 3, "c": True, "d": None, "e": ["q_proj", "v_proj"], "f": "x=y", "g": 1.5, "h": None, "i": "[half",
    }  # fmt: skip


@given(value=st.text() | st.from_regex(r"20\d\d-\d\d-\d\d|0b_*|0x_*|\d+:\d+", fullmatch=True))
@example(value="2024-99-99")
def test_no_value_on_the_command_line_ends_in_anything_but_a_value_or_a_config_error(value):
    try:
        assert list(parse_overrides([f"data.name={value}"])) == ["data.name"]
    except ConfigError as error:
        assert str(error)


def write_profile(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    (folder / "mine.yaml").write_bytes(content)
    monkeypatch.setattr(config_module, "PROFILES", folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model:\n  name: [embedded\n", "mine.yaml is not YAML at line 3"),
        (b"model: {name: embedded}\ndata: {name: 2024-99-99}\n", "mine.yaml is not YAML"),
        ("# über\n".encode("latin-1") + b"model: {name: embedded}\n", "mine.yaml is not YAML"),
        (b"", "mine.yaml holds no settings"),
        (b"- model\n", "mine.yaml holds no settings"),
        (b"train: {max_steps: 3}\n", "model is missing from the profile mine"),
        (b"model: {name: embedded}\ntrain: {max_step: 3}\n", "did you mean train.max_steps?"),
        (b"model: {name: embedded}\ntrain: {lora: 3, max_steps: x}\n", "train."),
    ],
)
def test_a_broken_profile_file_is_refused_by_its_name(tmp_path, monkeypatch, content, said):
    write_profile(tmp_path, monkeypatch, content)
    with pytest.raises(ConfigError) as caught:
        load_config("mine")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("profile", "overrides", "primary"),
    [
        ("demo", {}, "accuracy"),
        ("demo", {"data.path": "rows.jsonl"}, "nll"),
        ("demo", {"data.path": "rows.jsonl", "evaluate.benchmark.path": "items.jsonl"}, "multiple_choice"),
        ("tutorial", {}, "multiple_choice"),
        ("tutorial", {"evaluate.benchmark.name": None}, "nll"),
        ("tutorial", {"evaluate.primary": "nll"}, "nll"),
        ("demo", {"evaluate.primary": "auto"}, "accuracy"),
    ],
)
def test_an_automatic_primary_metric_becomes_what_the_data_can_carry(profile, overrides, primary):
    assert load_config(profile, overrides).evaluate.primary == primary


def test_a_relative_path_is_made_absolute_and_a_hub_id_stays(tmp_path):
    (tmp_path / "model").mkdir()
    given_ = {"data.path": "rows.jsonl", "model.name": "unsloth/x", "train.max_steps": 3}
    result = absolute_overrides(given_, tmp_path)
    assert result == {"data.path": str(tmp_path / "rows.jsonl"), "model.name": "unsloth/x", "train.max_steps": 3}
    assert absolute_overrides({"model.name": "model"}, tmp_path) == {"model.name": str(tmp_path / "model")}


def test_relative_paths_of_further_benchmarks_are_made_absolute(tmp_path):
    given_ = {"evaluate.more_benchmarks": [{"path": "items.jsonl", "rows": 3}, {"name": "a/b"}]}
    result = absolute_overrides(given_, tmp_path)["evaluate.more_benchmarks"]
    assert result == [{"path": str(tmp_path / "items.jsonl"), "rows": 3}, {"name": "a/b"}]


PINNED = {
    "model.revision": "a" * 40,
    "export.base_revision": "b" * 40,
    "data.revision": "c" * 40,
    "data.subset": "en",
    "evaluate.benchmark.revision": "d" * 40,
    "evaluate.benchmark.subset": "s",
}


@pytest.mark.parametrize(
    ("overrides", "cleared"),
    [
        ({"model.name": "other/model"}, {"model.revision", "export.base_revision"}),
        ({"export.base": "other/model"}, {"export.base_revision"}),
        ({"data.name": "other/ds"}, {"data.revision", "data.subset"}),
        ({"data.path": "rows.jsonl"}, {"data.revision", "data.subset"}),
        ({"data": {"name": "other/ds"}}, {"data.revision", "data.subset"}),
        ({"evaluate.benchmark.name": "o/b"}, {"evaluate.benchmark.revision", "evaluate.benchmark.subset"}),
        ({"evaluate.benchmark.path": "b.jsonl"}, {"evaluate.benchmark.revision", "evaluate.benchmark.subset"}),
        ({"train.max_steps": 3, "data.seed": 1}, set()),
    ],
)
def test_a_pinned_commit_does_not_outlive_the_name_it_belongs_to(overrides, cleared):
    """Another model was asked for by the commit of the one before, and local rows were told to come from a Hub commit."""
    after = config_module.flatten(edit_config(load_config("t4", PINNED), overrides).model_dump())
    assert {key: after[key] for key in PINNED} == {key: None if key in cleared else PINNED[key] for key in PINNED}


def test_a_commit_that_is_given_with_its_name_is_kept():
    given_ = {"data.revision": "e" * 40, "data.subset": "de", "data.name": "other/ds", "model.revision": "f" * 40}
    config = edit_config(load_config("t4", PINNED), given_ | {"model.name": "other/model"})
    assert (config.data.revision, config.data.subset, config.model.revision) == ("e" * 40, "de", "f" * 40)
    assert config.export.base_revision is None


def test_a_name_that_is_given_again_keeps_what_was_pinned_for_it(tmp_path):
    """Every notebook passes the same OVERRIDES: what 00 has pinned must be there in 01."""
    given_ = {"model.name": "other/model", "data": {"name": "other/ds"}, "evaluate.benchmark.name": "other/items"}
    pinned = {"model.revision": "a" * 40, "data.revision": "c" * 40, "evaluate.benchmark.revision": "d" * 40}
    before = edit_config(load_config("t4", given_), pinned)
    (tmp_path / "config.yaml").write_text(before.to_yaml(), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml", given_) == before


def test_nested_overrides_are_dotted_ones(tmp_path):
    """Rows given as {"data": {"path": ...}} stayed relative, were measured by the profile's benchmark, and reset the section."""
    nested = {"data": {"path": "rows.jsonl", "seed": 5}, "evaluate": {"benchmark": {"rows": 50}}}
    dotted = {"data.path": str(tmp_path / "rows.jsonl"), "data.seed": 5, "evaluate.benchmark.rows": 50}
    assert absolute_overrides(nested, tmp_path) == dotted
    assert load_config("t4", absolute_overrides(nested, tmp_path)) == load_config("t4", dotted)
    config = load_config("t4", nested)
    assert (config.evaluate.primary, config.data.train_rows) == ("nll", 4000)
    named = {"data": {"path": "rows.jsonl"}, "evaluate": {"benchmark": {"path": "items.jsonl"}}}
    assert load_config("demo", named).evaluate.primary == "multiple_choice"


def test_an_empty_section_given_as_override_takes_the_section_back():
    assert not load_config("tutorial", {"evaluate": {"benchmark": {}}}).evaluate.benchmark.wanted


def test_commits_that_the_run_pinned_itself_are_no_settings_other_than_the_profiles():
    full = load_config("full")
    more = [one.model_dump(mode="json") | {"revision": "e" * 40} for one in full.evaluate.more_benchmarks]
    own = {key: value for key, value in PINNED.items() if key.endswith("revision") and not key.startswith("data")}
    pinned = edit_config(full, own | {"evaluate.more_benchmarks": more})
    assert differing_settings(pinned) == {}
    assert differing_settings(edit_config(pinned, {"data.revision": "f" * 40})) == {"data.revision": "f" * 40}
    for changed in ([more[0], more[1] | {"rows": 7}], more[:1]):
        differing = differing_settings(edit_config(pinned, {"evaluate.more_benchmarks": changed}))
        assert differing == {"evaluate.more_benchmarks": changed}  # with its commits, as it is on file


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += dotted_keys(field.annotation, f"{prefix}{name}.")
    return keys


WORDS = st.sampled_from(["train", "evaluate", "benchmark", "data", "path", "max_steps", "profile", "x", ""])
ANY_KEY = st.sampled_from(dotted_keys(Config)) | st.lists(WORDS, min_size=1, max_size=4).map(".".join) | st.text()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=3) | st.dates()
ANY_VALUE = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3))


@settings(deadline=None, max_examples=200)
@given(overrides=st.dictionaries(ANY_KEY, ANY_VALUE, max_size=2))
@example(overrides={"evaluate": 5})
def test_any_override_validates_or_is_a_config_error(overrides):
    try:
        assert load_config("demo", overrides).to_yaml()
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"train.keep": "best"},
            "train.keep is best, but there are no validation rows to decide by; set data.validation_rows",
        ),
        (
            {"train.early_stopping_patience": 2},
            "train.early_stopping_patience is set, but there are no validation rows",
        ),
        (
            {"train.keep": "best", "data.validation_rows": 9, "train.eval_steps": 7},
            "train.save_steps=60 is no multiple of train.eval_steps=7; change either",
        ),
    ],
)
def test_what_the_validation_loss_decides_needs_validation_rows_and_checkpoints_where_it_is_measured(
    overrides, sentence
):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load_config("demo", overrides)
    assert load_config("demo", {"train.keep": "best", "data.validation_rows": 9}).train.eval_steps == 20
