"""The stages, and what each reads and writes."""

from __future__ import annotations

import pytest

from utils.pipeline.stages import STAGES, find_stage


@pytest.mark.parametrize("word", ["3", "03", "03_lora_training"])
def test_a_stage_is_found_by_number_or_name(word):
    assert find_stage(word).name == "03_lora_training"


def test_every_stage_reads_only_what_an_earlier_one_writes():
    written: list[str] = []
    for stage in STAGES:
        for name in stage.inputs:
            assert any(out == name or out.startswith(f"{name}/") or name.startswith(f"{out}/") for out in written)
        assert all(needed in {earlier.name for earlier in STAGES[: int(stage.number)]} for needed in stage.needs)
        written += (*stage.outputs, *stage.optional)
