"""Where two trainings part: digests of each matrix's gradient in each process, and the first that differs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.parting import Digests, compare


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def note(path, changed: str = "") -> dict:
    """Two updates of two layers, whose first or second one is changed a little at the second update."""
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    wrapped = DistributedDataParallel(layers)
    trainer = SimpleNamespace(
        model_wrapped=wrapped,
        accelerator=SimpleNamespace(scaler=None),
        get_batch_samples=lambda: ([{"input_ids": torch.tensor([[1, 2]])}], 2),
    )
    digests = Digests(trainer, path)
    digests.on_train_begin(None, None, None)
    for update in range(2):
        layers.zero_grad()
        trainer.get_batch_samples()
        digests.on_step_begin(None, SimpleNamespace(global_step=update), None, model=layers)
        wrapped(torch.ones(2, 4)).square().sum().backward()
        digests.on_pre_optimizer_step(None, None, None, model=layers)
        if changed and update == 0:
            with torch.no_grad():
                layers.get_parameter(changed)[0, 0] += 1e-3
    digests.on_train_end(None, None, None)
    return json.loads(path.read_text(encoding="utf-8"))


def test_gradients_are_noted_from_the_last_layer_on_and_the_same_ones_alike(tmp_path, group):
    one, other = note(tmp_path / "one.json"), note(tmp_path / "other.json")
    assert one == other and list(one) == ["1", "2"]
    assert compare([one], [other]) == []
    first = one["1"]
    assert list(first["weights"]) == list(first["own"]) == list(first["summed"]) == ["1.weight", "0.weight"]
    assert first["own"] == first["summed"]  # of a single process nothing is added
    assert first["given"]["rows"] and first["given"]["scale"] == "None"


def test_the_first_update_process_and_matrix_that_differ_are_found(tmp_path, group):
    plain, changed = note(tmp_path / "plain.json"), note(tmp_path / "changed.json", changed="0.weight")
    (found,) = compare([plain, plain], [plain, changed])
    assert (found["update"], found["process"]) == (2, 1)
    assert found["weights"] == {"of": 2, "differ": 1, "first": "0.weight"} and found["given"]["differ"] == 0
    assert found["own"] == found["summed"] == {"of": 2, "differ": 2, "first": "1.weight"}


def test_a_resumed_training_is_compared_where_it_went_on(tmp_path, group):
    whole = note(tmp_path / "whole.json")
    assert compare([whole], [{"2": whole["2"]}]) == []
