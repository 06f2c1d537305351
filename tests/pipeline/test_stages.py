"""The stages, and what each reads and writes."""

from __future__ import annotations

import pytest

from utils.errors import UserError
from utils.pipeline.stages import STAGES, find_stage


@pytest.mark.parametrize("word", ["3", "03", "03_lora_training"])
def test_a_stage_is_found_by_number_or_name(word):
    assert find_stage(word).name == "03_lora_training"


@pytest.mark.parametrize("word", ["6", "003", "", "lora_training"])
def test_another_word_is_told_which_stages_there_are(word):
    with pytest.raises(UserError, match=f"There is no stage '{word}'; there are 00 to 05"):
        find_stage(word)


def test_every_stage_reads_only_what_an_earlier_one_writes():
    written: list[str] = []
    for stage in STAGES:
        for name in stage.inputs:
            assert any(out == name or out.startswith(f"{name}/") or name.startswith(f"{out}/") for out in written)
        assert all(needed in {earlier.name for earlier in STAGES[: int(stage.number)]} for needed in stage.needs)
        written += (*stage.outputs, *stage.optional)
