"""The peers of training's benchmark are what they are said to be: packed, apart from their neighbours, by a T4's kernels."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import peers, train, train_cases
from benchmarks.standin import build_standin
from utils.data import synthetic
from utils.files import append_lines
from utils.models import unsloth_patches
from utils.training import step_plan


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """(folder of a tiny stand-in, JSONL file of training rows)."""
    folder = tmp_path_factory.mktemp("standin")
    build_standin(folder / "model", size="tiny")
    append_lines(folder / "rows.jsonl", synthetic.base_rows(60))
    return folder / "model", folder / "rows.jsonl"


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What `use_attention` and `boundary` change in this process is changed back."""
    for name in ("choose_attention", "attend_within_documents"):
        monkeypatch.setattr(unsloth_patches, name, getattr(unsloth_patches, name))
    for name in ("UNSLOTH_TORCH_VARLEN", "UNSLOTH_RETURN_LOGITS"):
        monkeypatch.setenv(name, "")


def test_rows_packed_without_unsloth_do_not_see_each_other(standin, tmp_path):
    train_cases.boundary("plain packing", *standin, tmp_path / "boundary.json")
    found = json.loads((tmp_path / "boundary.json").read_text(encoding="utf-8"))
    assert found["packed_against_alone"] < 1e-3 and found["packed_gradient_against_alone"] < 1e-3
    assert found["without_boundaries_against_alone"] > 0.1


def test_the_loss_of_a_pack_without_unsloth_is_that_of_its_rows_alone(standin, tmp_path):
    run, model, tokenizer, frame, make_trainer = train_cases.prepare("plain packing", *standin, tmp_path / "run", 60)
    plan = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    trainer = make_trainer(model, tokenizer, run.config, frame, plan, str(tmp_path / "trainer"))
    packs = trainer.train_dataset
    lengths = packs[0]["seq_lengths"]
    assert trainer.args.packing and len(lengths) > 1 and len(packs) < len(frame)

    def loss(rows: list[dict]) -> tuple[float, int]:
        """(sum of the losses, tokens in it)."""
        batch = trainer.data_collator(rows)
        assert "attention_mask" not in batch
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            return float(trainer.compute_loss(model, batch)) * count, count

    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    alone = [
        {"input_ids": packs[0]["input_ids"][start : start + n], "labels": packs[0]["labels"][start : start + n], "seq_lengths": [n]}
        for start, n in zip(starts, lengths, strict=True)
    ]  # fmt: skip
    total, tokens = loss([packs[0]])
    singles = [loss([row]) for row in alone]
    assert tokens == sum(count for _, count in singles)
    assert total == pytest.approx(sum(value for value, _ in singles), rel=1e-5)


def test_a_peer_takes_as_many_packs_into_an_update_as_ours_and_no_trial(standin, tmp_path):
    from utils.training.step_plan import choose_plan

    for name, micro in (("plain packing", 4), ("plain packing, 1 x 4", 1)):
        run, model, tokenizer, frame, make_trainer = train_cases.prepare(name, *standin, tmp_path / name, 60)
        plan = choose_plan(run, model, tokenizer, frame, make_trainer)
        assert (plan.per_device_train_batch_size, plan.gradient_accumulation_steps) == (micro, 4 // micro)
        assert plan.recompute_layers == 2, "every layer"


def test_the_largest_batch_is_the_last_one_that_fits():
    tried = []
    assert peers.largest_batch(lambda micro: tried.append(micro) or micro <= 6, 4) == 6 and tried == [5, 6, 7]
    assert peers.largest_batch(lambda micro: True, 4) == peers.LARGEST


def attended(monkeypatch, kind: str, backend: str, seq_info=(1, 2, 3)):
    """(backend, xformers' operators) that unsloth's own attention is called with, after `use_attention(kind)`."""
    cutlass = ModuleType("xformers.ops.fmha.cutlass")
    cutlass.FwOp, cutlass.BwOp = "forward", "backward"
    fmha = ModuleType("xformers.ops.fmha")
    fmha.cutlass = cutlass
    library = ModuleType("xformers._cpp_lib")
    library._register_extensions = lambda: None
    for module in (ModuleType("xformers"), library, ModuleType("xformers.ops"), fmha, cutlass):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    peers.use_attention(kind)
    calls = []
    attend = unsloth_patches.choose_attention(lambda config, **_: calls.append(config))
    query = SimpleNamespace(dtype=torch.float32, shape=(1, 4, 10, 8))  # not half precision: ours leaves it to unsloth
    context = SimpleNamespace(
        seq_info=seq_info, attention_mask=None, is_causal=True, sliding_window=None, prefix_seg_info=None
    )
    attend(config=SimpleNamespace(backend=backend, xformers_kwargs=None), context=context, Q=query, K=query, V=query)
    return calls[0].backend, (calls[0].xformers_kwargs or {}).get("op")


def test_xformers_is_taken_by_the_kernel_that_a_t4_has(monkeypatch):
    for kind in ("ours", "unsloth", "xformers"):
        assert attended(monkeypatch, kind, "xformers") == ("xformers", ("forward", "backward"))
    assert attended(monkeypatch, "xformers", "sdpa") == ("xformers", ("forward", "backward"))


def test_where_xformers_does_not_load_its_case_is_skipped_by_a_sentence(monkeypatch):
    library = ModuleType("xformers._cpp_lib")
    library._register_extensions = lambda: 1 / 0  # built for another torch
    for found in ({"xformers": None}, {"xformers": ModuleType("xformers"), "xformers._cpp_lib": library}):
        for name, module in found.items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(SystemExit, match=r"^skipped: xformers does not load here"):
            peers.use_attention("xformers")


@pytest.mark.parametrize(
    ("name", "tried"),
    [
        ("ours", [(1, 4, 0), (1, 4, 4), (1, 4, 8), (2, 2, 20), (4, 1, 28)]),
        ("ours, one pack at a time", [(1, 4, 0), (1, 4, 4), (1, 4, 8)]),
    ],
)
def test_of_one_pack_at_a_time_the_first_plan_that_fits_is_measured(standin, tmp_path, monkeypatch, name, tried):
    measured, found = [], []

    def measure(plan):
        measured.append((plan.per_device_train_batch_size, plan.gradient_accumulation_steps, plan.recompute_layers))
        return (float(len(measured)), 0.9) if plan.recompute_layers >= 8 else None

    def choose(*_):
        found.extend([step_plan.search(measure, 4, 32), step_plan.search(lambda plan: None, 4, 32)])
        raise KeyboardInterrupt

    before = step_plan._divisors
    monkeypatch.setattr(step_plan, "choose_plan", choose)
    with pytest.raises(KeyboardInterrupt):
        train_cases.case(name, *standin, tmp_path / "case.json", tmp_path / "run", 60)
    assert measured == tried and found[1] == [] and step_plan._divisors is before
    assert found[0][0] == (float(len(tried)), step_plan.StepPlan(*tried[-1]))


def test_torchs_kernel_is_forced_on_packed_rows_alone(monkeypatch):
    assert attended(monkeypatch, "torch", "xformers") == ("sdpa", None)
    assert attended(monkeypatch, "torch", "xformers", seq_info=None)[0] == "xformers"
    assert attended(monkeypatch, "ours", "sdpa") == ("sdpa", None)


def test_flex_attention_keeps_documents_apart_as_ours_does():
    torch.manual_seed(0)
    lengths, query = (70, 130, 56), torch.randn(1, 256, 4, 16)
    key, value = (torch.randn(1, 256, 2, 16) for _ in range(2))
    boundaries = torch.tensor([0, 70, 200, 256], dtype=torch.int32)
    found = peers.flex_attention_within_documents(on_gpu=False)(query, key, value, boundaries, max(lengths))
    documents = zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in document), is_causal=True, enable_gqa=True
        )
        for document in documents
    ]
    assert torch.allclose(found, torch.cat(pieces, dim=2).transpose(1, 2), atol=1e-5)


def test_a_skipped_configuration_is_no_failure_and_the_other_ones_stay(standin, tmp_path, monkeypatch):
    model, rows = standin
    skipped = "skipped: xformers does not load here (No module named 'xformers')"
    monkeypatch.setattr(train, "run_part", lambda arguments: skipped if "xformers" in arguments[1] else "out of memory")
    out, case = tmp_path / "train.json", {"tokens_per_second": 5.0, "reserved_gib": None}
    runner, command = CliRunner(), ["measure", str(model), "--rows", str(rows), "--out", str(out)]
    assert runner.invoke(train.app, [*command, "--only", "plain"]).exit_code == 1
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["failed"] == {"plain": "out of memory"}
    out.write_text(json.dumps(found | {"configurations": {"tutorial": case}, "failed": {}}))
    assert runner.invoke(train.app, [*command, "--only", "ours, xformers' attention"]).exit_code == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["skipped"] == {"ours, xformers' attention": skipped} and found["configurations"] == {"tutorial": case}
    out.write_text(json.dumps(found | {"processors": 1000}))
    refused = runner.invoke(train.app, [*command, "--only", "plain"])
    assert refused.exit_code == 1 and "are not this machine's; name another --out" in refused.output
    assert json.loads(out.read_text(encoding="utf-8"))["configurations"] == {"tutorial": case}
