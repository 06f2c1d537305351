"""The mutations of the fuzz tests are what they say: no case leaves a trace in the next one."""

from __future__ import annotations

import copy
import json
import random

from tests.faults.fuzzing import NASTY, _restructure


def test_a_mutated_value_shares_nothing_with_the_list_it_was_made_from():
    """It did: edits went into the list itself, until values held themselves and no JSON could be written of them."""
    before = copy.deepcopy([value for value in NASTY if isinstance(value, (list, dict))])
    for number in range(3000):
        json.dumps(_restructure(random.Random(number), {"a": [1, {"b": []}], "c": {"d": {}}}))
    assert [value for value in NASTY if isinstance(value, (list, dict))] == before
