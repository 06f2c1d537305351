"""The stand-in has the real model's shapes and token ids, and the committed evidence is what it is said to be."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from benchmarks import generate, merge, repeatability, smollm2, suffix
from benchmarks.calibration import Case, read_own, run_experiment
from benchmarks.evidence import add_to_file
from benchmarks.generate import SINGLES, peer_speed
from benchmarks.packing import ratio_over_seeds
from benchmarks.series import summarise
from benchmarks.standin import build_standin, build_tokenizer
from benchmarks.train import ratios
from benchmarks.train_cases import CASES, _kind_of, flops_per_token
from utils.data import synthetic
from utils.export.compare_logits import check_tolerance
from utils.files import append_lines
from utils.models import load
from utils.models.tokenizer import load_tokenizer
from utils.project import ROOT

EVIDENCE = json.loads((ROOT / "benchmarks" / "results" / "series-8b.json").read_text(encoding="utf-8"))
SPLIT = json.loads((ROOT / "benchmarks" / "results" / "split.json").read_text(encoding="utf-8"))
GENERATION = json.loads((ROOT / "benchmarks" / "results" / "generation.json").read_text(encoding="utf-8"))
TRAIN = json.loads((ROOT / "benchmarks" / "results" / "train.json").read_text(encoding="utf-8"))
BUSY = json.loads((ROOT / "benchmarks" / "results" / "train-busy.json").read_text(encoding="utf-8"))
UNPADDED = json.loads((ROOT / "benchmarks" / "results" / "train-unpadded.json").read_text(encoding="utf-8"))
SEVERAL = json.loads((ROOT / "benchmarks" / "results" / "several.json").read_text(encoding="utf-8"))
PARITY = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text(encoding="utf-8"))
SMOLLM2 = json.loads((ROOT / "benchmarks" / "results" / "smollm2.json").read_text(encoding="utf-8"))
LLAMA_8B = SimpleNamespace(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
VOCABULARY = ROOT.parent / "shared" / "data" / "llama3_bpe.model"


def test_the_stand_in_loads_as_a_model_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    build_standin(tmp_path, size="tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert model.config.vocab_size == 128256 and len(tokenizer) <= 128256
    output = model.generate(**tokenizer("Q?", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert output.shape[1] > 3


@pytest.mark.skipif(not VOCABULARY.exists(), reason="the Llama-3 vocabulary is not beside this checkout")
def test_over_the_llama_3_vocabulary_the_special_tokens_have_deepseeks_ids(tmp_path):
    build_tokenizer(VOCABULARY).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    marks = [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<|finetune_right_pad_id|>",
        "<｜User｜>",
        "<｜Assistant｜>",
    ]
    marks += ["<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(marks) == [128000, 128001, 128004, 128011, 128012, 128013, 128014]
    assert tokenizer.tokenize("Hello world, 12345") == ["Hello", "Ġworld", ",", "Ġ", "123", "45"]


def test_the_8b_run_went_through_unsloth_within_a_t4s_memory():
    stages = EVIDENCE["series"]["stages"]
    assert EVIDENCE["exit_status"] == [0, 0] and all(record["state"] == "done" for record in stages.values())
    assert len(stages) == 6 and EVIDENCE["gpu"]
    figures = stages["03_lora_training"]["figures"]
    assert [figures[f"fused_{part}"] for part in ("layers", "qkv", "o", "mlp")] == [32, 32, 32, 32]
    assert EVIDENCE["series"]["peak_gpu_reserved_gib"] <= 14.0


def test_the_plain_backend_trained_ten_steps_without_a_nan():
    plain = EVIDENCE["plain_backend"]
    assert plain["stages"]["03_lora_training"]["figures"]["backend"] == "transformers"
    assert plain["training"]["steps"] == 10 and plain["training"]["finite"]


def test_answering_in_batches_is_forty_times_as_fast_within_a_t4s_memory():
    for name in ("open questions", "multiple choice"):
        case = GENERATION["cases"][name]
        assert case["ratio"] == pytest.approx(
            case["tokens_per_second"] / sorted(case["one_at_a_time_windows"])[1], abs=0.01
        )
        assert case["ratio"] >= 40 and case["reserved_gib"] <= 14.0 and len(case["one_at_a_time_windows"]) >= 3
    assert GENERATION["ratio"] == GENERATION["cases"]["open questions"]["ratio"] and GENERATION["gpu"]


def test_a_killed_run_generated_no_answer_twice_and_lost_none():
    kill = GENERATION["kill"]
    assert 0 < kill["killed_after"] < kill["answers"] == 200 and kill["generated_twice"] == kill["missing"] == 0


def test_what_was_killed_ended_the_same_on_one_gpu_and_within_a_thousandth_on_two_which_gave_the_answers_of_one():
    assert {found["processes"] for found in SEVERAL["resumed"]} == {1, 2}
    for found in SEVERAL["resumed"]:
        assert found["updates"] == [120, 120] and 0 < found["killed_after_checkpoint"] < 120
        assert found["last_loss_difference"] == abs(found["last_losses"][0] - found["last_losses"][1]) < 1e-3
        assert found["processes"] == 2 or found["largest_weight_difference"] == found["largest_loss_difference"] == 0
        assert len(found["gpu"]) >= found["processes"] and found["versions"]["torch"]
    # Of the last date kernels are not chosen by their time.
    (run,) = [run for run in SEVERAL["resumed"] if run["date"] == "2026-11-27"]
    assert run["processes"] == 2 and run["largest_loss_difference_up_to_the_checkpoint"] == 0
    apart = [abs(one - other) for one, other in zip(*run["losses"], strict=True)]
    assert max(apart) == pytest.approx(run["largest_loss_difference"], abs=2e-6) and max(apart) < 1e-3
    assert max(apart[:60]) == 0 < apart[60]
    assert SEVERAL["answers"]["same"] == SEVERAL["answers"]["questions"] == 224


@pytest.mark.parametrize(
    ("name", "out_of_memory", "sorted_batches"), [("real_job", [], 2), ("real_job_before_graphs", [18], 1)]
)
def test_the_real_jobs_figures_follow_from_its_batches_and_windows(name, out_of_memory, sorted_batches):
    job = GENERATION[name]
    engine, batches = job["engine"], job["engine"]["batches"]
    assert engine["questions"] == 616 and engine["reserved_gib"] <= 14.0 and engine["out_of_memory"] == out_of_memory
    assert engine["steps"] == sum(steps for _, steps, _ in batches)
    assert engine["tokens"] <= sum(rows * steps for rows, steps, _ in batches)
    assert engine["tokens_per_second"] == pytest.approx(engine["tokens"] / engine["seconds"], abs=0.1)
    assert 0.97 * engine["seconds"] < sum(seconds for _, _, seconds in batches) < engine["seconds"]
    assert len(job["single"]) == SINGLES and len(job["sorted"]) == sorted_batches
    for peer in ("single", "sorted"):
        assert job[f"ratio_{peer}"] == round(engine["tokens_per_second"] / peer_speed(job[peer]), 2)


def test_the_real_job_is_as_fast_as_the_docs_say():
    job, before = GENERATION["real_job"], GENERATION["real_job_before_graphs"]
    engine, text = job["engine"], " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    assert job["ratio_single"] >= 25 and job["ratio_sorted"] >= 1.2 and job["peers_at_the_same_time"]
    assert f"took {engine['seconds']:.0f} s at {engine['tokens_per_second']:,.0f} tokens/s" in text
    assert f"{job['ratio_single']:.0f} times as fast as a dozen" in text
    assert f"{job['ratio_sorted']:.0f} times as fast as two batches" in text
    assert f"took {before['engine']['seconds']:,.0f} s at {before['engine']['tokens_per_second']:.0f} tokens/s" in text
    milliseconds = [(rows, 1000 * seconds / steps) for rows, steps, seconds in engine["batches"]]
    several, few = ([ms for rows, ms in milliseconds if low <= rows <= high] for low, high in ((10, 99), (2, 6)))
    (alone,) = [ms for rows, ms in milliseconds if rows == 1]
    assert len(several) + len(few) + 1 == len(milliseconds)
    assert f"A step** takes {min(several):.0f} to {max(several):.0f} ms with ten" in text
    assert f"and {min(few):.0f} to {max(few):.0f} ms with two to six" in text
    assert f"**The last answer alone** took {alone:.0f} ms a token" in text and 2.5 < alone / min(few) < 3.5
    others = [engine["tokens_per_second"] / peer_speed(before[peer]) for peer in ("single", "sorted")]
    assert "new job is {:.0f} and {:.0f} times as fast".format(*others) in text
    assert f"at work: {engine['tokens'] / engine['steps']:.0f} on average" in text


@pytest.fixture
def short_job(tmp_path, monkeypatch):
    """(arguments of the real job's commands but --out, evidence): a tiny stand-in, 24 short answers, two of them alone."""
    build_standin(tmp_path / "model", size="tiny")
    items = [
        {"id": f"{i}", "question": f"Which of {i} drugs?", "options": dict.fromkeys("ABCD", "one")} for i in range(20)
    ]
    append_lines(tmp_path / "items.jsonl", items)
    append_lines(tmp_path / "rows.jsonl", synthetic.base_rows(20))
    for name, value in {"LIMIT": 8, "MEDIAN": 4, "SINGLES": 2}.items():
        monkeypatch.setattr(generate, name, value)
    questions = generate.real_questions
    monkeypatch.setattr(generate, "real_questions", lambda *given: (questions(*given)[0][:24], questions(*given)[1]))
    given = {"items": tmp_path / "items.jsonl", "rows": tmp_path / "rows.jsonl"}
    return {"standin": tmp_path / "model", **given}, tmp_path / "out.json"


def test_the_real_jobs_engine_is_compared_with_what_its_peers_left(short_job, monkeypatch):
    (given, out), commands = short_job, []
    monkeypatch.setattr(load, "patch_unsloth", load.patch_unsloth)  # which the peers replace

    class InThisProcess:
        def __init__(self, command, log, environment):
            commands.append([str(part) for part in command])
            place = Path(command[command.index("--out") + 1])
            generate.peers(**given, out=place)

        __enter__, __exit__, wait = lambda self: self, lambda self, *_: None, lambda self: 0

    monkeypatch.setattr(generate, "Child", InThisProcess)
    generate.real_job(**given, out=out)
    found = json.loads(out.read_text(encoding="utf-8"))["real_job"]
    assert found["engine"]["questions"] == 24 and not found["peers_at_the_same_time"]
    assert [len(found["single"]), len(found["sorted"])] == [2, 2] and found["ratio_single"] > 0 < found["ratio_sorted"]
    (command,) = commands
    assert command[1:5] == ["-m", "benchmarks.generate", "peers", str(given["standin"])]


def test_where_the_peers_fail_the_engines_figures_stay_and_a_sentence_says_so(short_job, monkeypatch):
    given, out = short_job
    failed = SimpleNamespace(wait=lambda: 1, last_words=lambda: "CUDA out of memory")
    monkeypatch.setattr(generate, "Child", lambda *_: contextlib.nullcontext(failed))
    with pytest.raises(
        SystemExit, match=r"peers ended with status 1 \(CUDA out of memory\); the engine's figures are in "
    ):
        generate.real_job(**given, out=out)
    assert json.loads(out.read_text(encoding="utf-8"))["real_job"]["engine"]["questions"] == 24


def test_a_graphs_step_gives_unsloths_logits_in_half_the_time():
    steps = GENERATION["steps"]
    assert {found["model"] for found in steps["logits"]} == {"base", "LoRA"}
    assert all(found["largest_difference"] < 0.03 and found["same_likeliest"] == 1 for found in steps["logits"])
    assert max(steps["fused_product"]["errors"].values()) < 1e-3
    graphs = {(way["way"], way["length"], way["rows"]): way["step_ms"] for way in steps["ways"]}
    for before in steps["launch_by_launch"]["steps"]:
        assert graphs["unpacked", before["length"], before["rows"]] < before["step_ms"] / 2


def test_attentions_backward_pass_gives_the_same_bits_and_splitting_its_keys_pays():
    shapes = SEVERAL["attention_twice"]["shapes"]
    assert all(shape["same"] == {"None": True, "1": True} for shape in shapes)
    dearer = [shape["microseconds"]["1"] / shape["microseconds"]["None"] for shape in shapes]
    text = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    assert f"the pass takes {min(dearer):.1f} to {max(dearer):.0f} times as long" in text


def test_more_rows_cost_little_before_the_first_update_and_nothing_in_each():
    few, some, many = (TRAIN["growth"]["by_rows"][count] for count in ("500", "2000", "8000"))
    assert many["packs"] > 15 * few["packs"] and many["prepare_seconds"] < 2 * few["prepare_seconds"]
    speeds = [found["tokens_per_second"] for found in (few, some, many)]
    assert max(speeds) < 1.15 * min(speeds)


def test_what_is_added_to_evidence_leaves_the_rest(tmp_path):
    add_to_file(tmp_path / "e.json", {"a": 1})
    add_to_file(tmp_path / "e.json", {"b": 2})
    add_to_file(tmp_path / "e.json", {"a": 3})
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8")) == {"a": 3, "b": 2}


def test_twenty_thousand_questions_were_split_within_a_minute_and_four_gib():
    assert SPLIT["questions"] == 20_000 and SPLIT["items"] == 1_273 and SPLIT["item_mean_characters"] > 700
    assert 200 <= SPLIT["mean_characters"] <= 260 and SPLIT["seconds"] <= 60 and SPLIT["peak_rss_gib"] <= 4
    assert SPLIT["planted_found"] >= 0.9 * SPLIT["planted"] and SPLIT["others_dropped"] <= 0.02 * SPLIT["questions"]


def test_recombined_questions_are_as_long_as_the_real_ones_and_the_same_every_time():
    import numpy as np

    from benchmarks.split import recombine

    texts = ["one two three four five six seven eight", "two one four three six five eight seven nine ten"]
    made = recombine(50, texts, np.random.default_rng(1))
    assert made == recombine(50, texts, np.random.default_rng(1)) and len(set(made)) > 40
    assert 7 <= sum(len(text.split()) for text in made) / 50 <= 11


NOT_MEASURED_YET = {
    *("ours, 1,024 tokens", "ours, 512 tokens", "unsloth's attention"),  # since micro-batches are padded
    *("ours, torch's attention", "ours, flex attention"),
}


@pytest.mark.parametrize(("found", "least"), [(TRAIN, "ours, one pack at a time"), (BUSY, "ours")])
def test_training_evidence_is_of_the_8b_shapes_within_fourteen_gib_and_the_ratios_follow_from_its_windows(found, least):
    cases = found["configurations"]
    assert all(len(case["windows"]) >= 3 for case in cases.values()) and not found["failed"]
    speed = {name: statistics.median(case["windows"]) for name, case in cases.items()}
    kernel = {name: case["kernels"]["tokens_per_second"] for name, case in cases.items()}
    assert ratios(found).items() <= found.items()
    assert found["ratio_vs_tutorial"] == round(speed["ours"] / speed["tutorial"], 2)
    assert found["ratio_vs_plain"] == round(speed["ours"] / speed["plain"], 2) >= 2.5
    assert found["ratio_vs_tutorial_kernel"] == round(kernel[least] / kernel["tutorial"], 2)
    assert found["ratio_vs_unsloth_packing_kernel"] == round(kernel[least] / kernel["unsloth packing"], 2) >= 1.4
    assert found["reserved_gib"] == max(case["reserved_gib"] for case in cases.values()) <= 14.0
    flops = flops_per_token(LLAMA_8B, cases["ours"]["fit"]["recompute_layers"])
    head, layers = 4096 * 128256, 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    assert flops == cases["ours"]["flops_per_token"] and flops_per_token(LLAMA_8B, 32) == 6 * layers + 4 * head
    assert found["peak_share"] == round(speed["ours"] * flops / found["peak"]["tflops"] / 1e12, 3)


def test_each_configuration_was_measured_or_is_told_why_not():
    assert TRAIN["configurations"].keys() | BUSY["configurations"].keys() == (
        CASES.keys() - NOT_MEASURED_YET - BUSY["skipped"].keys()
    )
    assert BUSY["skipped"].keys() == {"ours, xformers' attention"} and not TRAIN["skipped"]
    assert all(run["peak_memory"]["gpu_reserved_gib"] <= 14.0 for run in two_gpu_runs())


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::mm", [[1856, 4096], [4096, 14336]], "base model's products"),
        ("aten::addmm_", [[1856, 4096], [1856, 16], [16, 4096], [], []], "LoRA's products"),
        ("aten::mm", [[1856, 4096], [4096, 128256]], "output head"),
        ("aten::_efficient_attention_backward", [[1, 1856, 32, 128]], "attention"),
        ("_nf4_dequant_kernel", [], "4-bit weights unpacked"),
        ("aten::copy_", [[16, 4096], [16, 4096], []], "copies and casts"),
        ("nvjet_sm90_hsh_128x256_64x4_2x1_v_bz_coopA_TNN", [], None),
        ("LoRA_MLP", [[1, 1856, 4096]], None),
    ],
)
def test_a_products_kind_is_told_by_its_shapes_and_a_kernel_is_not_counted_beside_its_operation(name, shapes, kind):
    assert _kind_of(name, shapes, 16, 128256) == kind


def test_padding_to_eights_took_a_quarter_off_loras_products_and_nothing_else_grew_by_more_than_a_twentieth():
    before, after = (found["operations"] for found in (UNPADDED, BUSY["configurations"]["ours"]))
    assert after["LoRA's products"][1] < 0.75 * before["LoRA's products"][1]
    others = [kind for kind in before if before[kind][1] > 5 and kind != "LoRA's products"]
    assert all(after[kind][1] < 1.05 * before[kind][1] for kind in others)


def test_what_the_docs_say_was_tried_is_what_was_measured():
    tried = json.loads((ROOT / "benchmarks" / "results" / "train-tried.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    beside, alone = tried["configurations"], tried["alone"]["configurations"]
    for case in (*beside.values(), *alone.values()):
        assert case["tokens_per_second"] == statistics.median(case["windows"]) and case["reserved_gib"] <= 14.0
    both = "cast once, fused AdamW"
    kernel = [beside[both], alone[both], beside["cast once"], beside["cast once, fused AdamW, flex attention"]]
    wall = [beside[both], beside[f"{both}, again"], alone[both], alone["unsloth packing"]]
    said = [case["kernels"]["tokens_per_second"] for case in kernel] + [case["tokens_per_second"] for case in wall]
    assert [f"{speed:,.0f}" for speed in said if f"{speed:,.0f}" not in text] == []
    assert (
        f"{alone[both]['tokens_per_second'] / alone['unsloth packing']['tokens_per_second']:.2f} times as fast" in text
    )
    share = alone[both]["tokens_per_second"] * alone[both]["flops_per_token"] / tried["alone"]["peak"]["tflops"] / 1e12
    assert f"at {share:.0%}".replace("%", " %") in text
    unsplit = tried["keys_not_split"]
    ours, packing = unsplit["configurations"].values()
    ran = f"{ours['tokens_per_second']:,.0f} tokens/s by wall time and {ours['kernels']['tokens_per_second']:,.0f} by kernel time"
    assert f"{ran}: {unsplit['peak_share']:.0%} and {unsplit['peak_share_kernel']:.0%}".replace("%", " %") in text
    wall, kernel = (
        by(ours) / by(packing) for by in (lambda c: c["tokens_per_second"], lambda c: c["kernels"]["tokens_per_second"])
    )
    assert f"{wall:.2f} and {kernel:.2f} times unsloth's packing" in text
    gpus = [unsplit["two_gpus"][f"{count} GPU"] for count in (1, 2)]
    assert all(g["seconds_per_update"] == round(statistics.median(g["update_seconds"][2:]), 4) for g in gpus)
    assert unsplit["two_gpus"]["ratio"] == round(gpus[0]["seconds_per_update"] / gpus[1]["seconds_per_update"], 3)
    assert f"Two GPUs, by plans that recompute less, were {unsplit['two_gpus']['ratio']:.2f} times" in text
    allocated = [case["allocated_gib"] for case in (tried["loss_in_pieces"], BUSY["configurations"]["ours"])]
    assert f"{allocated[0]:.2f} GiB were allocated at most in place of {allocated[1]}" in text
    # Launches of two updates; the optimizer's share is what the same plan has more with the 8-bit one.
    optimizer = (beside["cast once"]["kernels"]["launches"] - alone[both]["kernels"]["launches"]) // 2
    cast = (
        BUSY["configurations"]["ours"]["kernels"]["launches"] - beside[both]["kernels"]["launches"]
    ) // 2 - optimizer
    assert optimizer == 422 and round(cast, -2) == 2100
    by_kernel = tried["two_gpus_by_kernel"]
    alone, *halves = (case["kernels"] for case in (by_kernel["1 GPU"], *by_kernel["2 GPUs"]))
    waited = [next(entry[2] for entry in half["longest"] if entry[0].startswith("nccl")) for half in halves]
    ms = [500 * alone["seconds"], *(500 * (half["seconds"] - wait) for half, wait in zip(halves, waited, strict=True))]
    said = f"takes one H100 {ms[0]:.0f} ms, and its two halves take each of two {ms[1]:.0f} and {ms[2]:.0f} ms"
    added_up, longest = 500 * min(waited), max(ms[1:])
    assert f"{said}: {ms[0] / longest:.2f} times" in text
    with_sums = f"up to {added_up:.0f} ms more, waiting included: {ms[0] / (longest + added_up):.2f} times"
    assert with_sums in text


def test_where_the_trials_time_went_adds_up_and_the_first_update_comes_sooner():
    tried = json.loads((ROOT / "benchmarks" / "results" / "train-tried.json").read_text(encoding="utf-8"))
    wall = json.loads((ROOT / "benchmarks" / "results" / "wall.json").read_text(encoding="utf-8"))
    trials, text = tried["trials_by_part"], (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    said, before, now = " ".join(text.split()), tried["every_trainer_rewritten"], wall["ours"]["seconds"]
    trials_before = before["ours"]["seconds"]["trials"]
    assert sum(trials["seconds"].values()) == pytest.approx(trials_before, abs=0.2)
    assert f"four plans took {now['trials']:.0f} s, and {trials_before:.0f} s in a run before" in said
    first, first_before = wall["first_update_seconds"], before["first_update_seconds"]
    assert f"it takes {first:.0f} s on an H100, trials included. It took {first_before:.0f} s on another" in said
    assert f"That is {wall['trials_share']:.0%} of what training".replace("%", " %") in said
    loads = f"loading takes {now['load']:.0f} s in place of {before['ours']['seconds']['load']:.0f}, and the loads of 01, 03 and 04"
    assert f"{loads} together {wall['parts']['loads']:.0f} s in place of {before['parts']['loads']:.0f}" in said
    assert f"did not fit, {trials['compiling_in_the_plan_that_did_not_fit']} s of it compiling" in said
    assert [seconds for seconds in trials["seconds"].values() if f"| {seconds} s |" not in text] == []
    assert all(trials[key] == before[key] for key in ("date", "gpu", "processors", "versions"))
    assert all(before[key] == wall[key] for key in ("gpu", "processors", "versions"))
    collected = trials["garbage_collector"]
    assert f"{collected['seconds'] / collected['calls']:.2f} s each time: {collected['seconds']:.0f} s of a run" in text


def test_two_processes_part_within_eight_updates_where_kernels_are_chosen_by_their_time_alone():
    text = (ROOT / "benchmarks" / "results" / "parting.json").read_text(encoding="utf-8")
    by_time, eager, now = json.loads(text)["trials"]
    assert all((trial["updates"], trial["digests_of_an_update"]) == (8, 128) for trial in (by_time, eager, now))
    for trial in (eager, now):
        assert trial["undisturbed"] == [[]] and trial["resumed"] == []
    assert (by_time["by_time"], eager["by_time"], now["by_time"]) == (True, False, False)
    assert (
        eager["environment"] == {"TORCH_COMPILE_DISABLE": "1"} and not by_time["environment"] and not now["environment"]
    )
    for parted, matrices in ((by_time["undisturbed"][0], 21), (by_time["resumed"], 42)):
        first = parted[0]
        assert first["given"]["differ"] == first["weights"]["differ"] == 0
        assert first["summed"]["differ"] == matrices and "layers.2.mlp" in first["summed"]["first"]
    assert [entry["own"]["differ"] > 0 for entry in by_time["resumed"][:2]] == [False, True]


def test_graphs_train_to_the_same_losses_at_the_speeds_that_the_docs_say():
    tried = json.loads((ROOT / "benchmarks" / "results" / "train-tried.json").read_text(encoding="utf-8"))["in_graphs"]
    text = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    ours, packing = tried["configurations"].values()
    for case in (ours, packing):
        assert case["tokens_per_second"] == statistics.median(case["windows"]) and case["reserved_gib"] <= 14.0
    speeds = [(case["tokens_per_second"], case["kernels"]["tokens_per_second"]) for case in (ours, packing)]
    (wall, kernel), (their_wall, their_kernel) = speeds
    assert f"{wall:,.0f} tokens/s by wall time and {kernel:,.0f} by kernel time" in text
    assert f"both {wall / their_wall:.2f} times unsloth's {their_wall:,.0f} and {their_kernel:,.0f}" in text
    assert f"{kernel / their_kernel:.2f}" == f"{wall / their_wall:.2f}"
    assert f"Two trials took {ours['seconds']['trials']:.0f} s" in text
    assert f"Wall time is still {1 - wall / kernel:.0%} below kernel time".replace("%", " %") in text
    now = {name: TRAIN["configurations"][name] for name in ("ours", "ours, one pack at a time", "ours, in graphs")}
    chosen, least, graphs = ((case["tokens_per_second"], case["kernels"]["tokens_per_second"]) for case in now.values())
    said = f"{graphs[1]:,.0f} tokens/s by kernel time in graphs, and {least[1]:,.0f} without"
    assert f"{said}, which is {least[1] / graphs[1] - 1:.0%} more".replace("%", " %") in text
    packing, both = (TRAIN["configurations"][name] for name in ("unsloth packing", "ours"))
    share = [by * packing["flops_per_token"] / TRAIN["peak"]["tflops"] / 1e12
             for by in (packing["tokens_per_second"], packing["kernels"]["tokens_per_second"])]  # fmt: skip
    assert f"unsloth's packing reaches {share[0]:.0%} by the clock and {share[1]:.0%}".replace("%", " %") in text
    times = both["kernels"]["tokens_per_second"] / packing["kernels"]["tokens_per_second"]
    assert f"`t4` is {times:.2f} times as fast as unsloth's packing by kernel time" in text
    headline = [TRAIN[key] for key in ("ratio_vs_unsloth_packing", "ratio_vs_unsloth_packing_kernel")]
    assert f"By the clock `t4` is {headline[0]} times" in text and f"it is {headline[1]} times as fast: that" in text
    low, _, high = now["ours, in graphs"]["windows"]
    assert f"reached {graphs[0]:,.0f} there, in windows that still rose from {low:,.0f} to {high:,.0f}" in text
    assert f"without them {chosen[0]:,.0f}. On two" in text
    launched, replayed = (tried["losses"][way] for way in ("launch by launch", "in graphs"))
    apart = [abs(one - other) for (one, _), (other, _) in zip(launched["losses"], replayed["losses"], strict=True)]
    assert len(apart) == 12 and max(apart) < 1e-4
    faster = statistics.median(replayed["tokens_per_second"]) / statistics.median(launched["tokens_per_second"])
    assert f"were {faster:.1f} times as slow without graphs" in text


def test_a_ratio_is_to_the_faster_of_a_peers_configurations_by_each_clock():
    def case(wall: float, kernel: float | None) -> dict:
        kernels = {"tokens_per_second": kernel} if kernel else None
        return {"tokens_per_second": wall, "kernels": kernels, "reserved_gib": 9.0, "flops_per_token": 1e9}

    cases = {"ours": case(120, 150), "unsloth packing": case(80, 100), "unsloth packing, largest batch": case(60, 125)}
    found = ratios({"configurations": cases, "peak": {"tflops": 0.3}})
    assert (found["ratio_vs_unsloth_packing"], found["ratio_vs_unsloth_packing_kernel"]) == (1.5, 1.2)
    assert (found["peak_share"], found["peak_share_kernel"]) == (0.4, 0.5) and "ratio_vs_plain" not in found
    without_kernels = ratios({"configurations": {"ours": case(120, None), "plain": case(40, None)}})
    assert without_kernels == {"reserved_gib": 9.0, "ratio_vs_plain": 3.0}
    found = ratios({"configurations": cases | {"ours, one pack at a time": case(100, 200)}})
    assert (found["ratio_vs_unsloth_packing"], found["ratio_vs_unsloth_packing_kernel"]) == (1.5, 1.6)


def two_gpu_runs() -> list[dict]:
    return [TRAIN["two_gpus"][f"{count} GPU"] for count in (1, 2)]


def test_two_gpus_took_the_same_rows_into_each_update_as_one():
    one, two = two_gpu_runs()
    assert (one["figures"]["processes"], two["figures"]["processes"]) == (1, 2)
    assert [run["figures"]["fused_layers"] for run in (one, two)] == [32, 32]
    # The eighth ends the epoch with one pack, and the second GPU takes the epoch's first pack again.
    before_they_part = list(zip(one["losses"], two["losses"], strict=True))[:7]
    assert all(abs(a - b) < 1e-3 for a, b in before_they_part)  # fp16, sums in another order
    apart = max(abs(a - b) for a, b in before_they_part), abs(one["losses"][7] - two["losses"][7])
    text = " ".join((ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8").split())
    assert f"losses are within {apart[0]:.4f} up to there, and {apart[1]:.2f} apart in that update" in text
    seconds = [statistics.median(run["update_seconds"][2:]) for run in (one, two)]
    assert TRAIN["ratio_two_gpus"] == pytest.approx(seconds[0] / seconds[1], abs=2e-3)


REPEATABILITY = ROOT / "benchmarks" / "results" / "repeatability.json"


@pytest.mark.skipif(not REPEATABILITY.exists(), reason="not measured yet: python -m benchmarks.repeatability")
def test_three_repeats_on_a_gpu_lie_within_the_tolerance():
    found = json.loads(REPEATABILITY.read_text(encoding="utf-8"))
    assert found["gpu"] and found["backend"] == "unsloth" and found["packed"] and found["same_conditions"]
    assert len(found["losses"]) == found["repeats"] == repeatability.REPEATS
    assert {len(losses) for losses in found["losses"]} == {repeatability.STEPS} == {found["steps"]}
    last = [losses[-1] for losses in found["losses"]]
    assert found["max_loss_difference"] == max(last) - min(last) <= repeatability.TOLERANCE == found["tolerance"]
    assert found["adapters_bit_identical"] is (len(set(found["adapter_sha256"])) == 1)
    assert found["adapters_bit_identical"] is (found["max_weight_difference"] == 0.0)


def test_repeats_are_compared_step_by_step_and_weight_by_weight(tmp_path):
    import torch
    from safetensors.torch import save_file

    adapters = [tmp_path / str(number) for number in range(3)]
    for number, path in enumerate(adapters):
        save_file({"a": torch.tensor([1.0, 2.0 + (number == 2) * 0.5])}, path)
    results = [{"losses": losses, "adapter_sha256": str(losses)} for losses in ([3.0, 2.0], [3.25, 2.0], [3.0, 2.0])]
    found = repeatability.compare(results, adapters)
    assert found["max_loss_difference"] == 0.0 and found["max_loss_difference_at_any_step"] == 0.25
    assert found["within_tolerance"] and not found["losses_bit_identical"] and not found["adapters_bit_identical"]
    assert found["max_weight_difference"] == 0.5
    results[2]["losses"] = [3.0, 2.0 + 2 * repeatability.TOLERANCE]
    assert not repeatability.compare(results, adapters)["within_tolerance"]


def test_the_merge_of_8b_shapes_takes_the_memory_of_one_shard_and_seconds():
    merge = json.loads((ROOT / "benchmarks" / "results" / "merge.json").read_text(encoding="utf-8"))
    assert merge["gib"] > 14 and merge["shards"] > 1 and merge["merges_are_identical"]
    assert merge["peak_rss_gib"] < merge["largest_shard_gib"] + 1.2 and min(merge["seconds"]["merge"]) < 30
    copied = min(merge["seconds"]["front_to_back"])
    assert merge["time_ratio"] == pytest.approx(min(merge["seconds"]["merge"]) / copied, rel=1e-2)


def test_the_merged_8b_shapes_agree_with_the_adapter_on_their_base():
    merge = json.loads((ROOT / "benchmarks" / "results" / "merge.json").read_text(encoding="utf-8"))
    assert set(merge["agreement"]) == {"float32", "bfloat16"} and merge["gpu"]
    for name in ("float32", "bfloat16"):
        found = merge["agreement"][name]
        assert found["prompts"] >= 8 and found["problem"] is None and check_tolerance(found, "bfloat16") is None
        # Random weights leave every token all but undecided; where tokens parted, it was for less than the rounding.
        assert found["largest_margin_lost"] <= found["largest_logit_difference"]


def test_a_gpu_repeats_a_loss_within_the_tolerance_and_the_plain_backend_trains_under_profile_t4():
    repeats = json.loads((ROOT / "benchmarks" / "results" / "repeatability.json").read_text(encoding="utf-8"))
    last = [losses[-1] for losses in repeats["losses"]]
    assert len(last) == 3 and all(len(losses) == repeats["steps"] == 20 for losses in repeats["losses"])
    assert max(last) - min(last) == pytest.approx(repeats["max_loss_difference"]) and repeats["same_conditions"]
    assert repeats["max_loss_difference"] <= repeats["tolerance"] == 1e-3
    plain = EVIDENCE["plain_backend"]["stages"]["03_lora_training"]
    assert plain["figures"]["backend"] == "transformers" and plain["figures"]["steps"] == 10
    assert plain["peak_memory"]["gpu_reserved_gib"] <= 14.0 and EVIDENCE["plain_backend"]["training"]["finite"]


def test_the_merge_benchmark_describes_its_options_and_no_number_of_rounds_but_theirs():
    options = [name for name, value in inspect.signature(merge.main).parameters.items() if name != "base"]
    assert [name for name in options if f"--{name}" not in merge.__doc__] == []
    assert not re.search(r"(two|three|\d) rounds", merge.__doc__, re.IGNORECASE)


def test_the_calibration_calls_no_model_better_or_worse_that_knows_as_much_and_keeps_what_00_announces():
    cases = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text(encoding="utf-8"))["cases"]
    same = "SmolLM2 before and after, same knowledge"
    for name in ("no difference", "fewer letters, same knowledge", "shorter, same knowledge", same):
        assert cases[name]["better"] + cases[name]["worse"] <= 0.05, name
    gains = {name: case for name, case in cases.items() if "announced" in case}
    assert len(gains) == 3
    for name, case in gains.items():
        assert case["better"] == pytest.approx(case["announced"], abs=0.05), name


def test_a_prompt_that_suppresses_letters_is_not_taken_for_less_knowledge():
    evidence = json.loads((ROOT / "benchmarks" / "results" / "suffix.json").read_text(encoding="utf-8"))
    assert evidence["n"] == 200 and evidence["verdict"] == "cannot tell" and evidence["suffix"] == suffix.SUFFIX
    assert evidence["metrics"]["parsed"]["ci95"][1] < -0.25, "the suffix suppresses next to no letter"
    assert evidence["metrics"]["multiple_choice"]["ci95"][1] < 0, "strict accuracy alone was to be fooled by it"


def test_the_two_prompts_are_compared_by_strict_and_forced_accuracy_as_two_models_are():
    right = np.arange(100) % 2.0
    plain = pd.DataFrame({"group": [f"q{i}" for i in range(100)], "correct": right, "forced": right, "parsed": 1.0})
    fewer = suffix.compare(plain, plain.assign(correct=0.0, parsed=0.0))
    parsed = fewer["metrics"]["parsed"]
    assert fewer["verdict"] == "cannot tell" and (parsed["base"], parsed["tuned"]) == (1.0, 0.0)
    assert suffix.compare(plain, plain.assign(correct=0.0, forced=0.0))["verdict"] == "worse"


def test_a_simulated_run_without_a_difference_is_judged_by_the_code_that_judges_real_ones():
    forms = np.array([[1.0, 1.0], [0.0, 0.0]])
    for case, verdict in ((Case(), "cannot tell"), (Case(gain=0.4, asked=0.1), "better")):
        assert run_experiment(case, 300, (forms, forms), np.random.default_rng(1)) == verdict


def test_the_forms_of_a_models_own_answers_are_counted_as_they_are_scored(tmp_path):
    texts = {
        "a": "Hm.</think>The answer is B.",
        "b": "Hm.</think>It is gout.",
        "c": "Hm.</think>No.",
        "d": "The answer is B.",
    }
    rows = [
        {"id": name, "kind": "choice", "text": text, "finish_reason": "length" if name == "d" else "stop", "tokens": 8}
        for name, text in texts.items()
    ]
    append_lines(tmp_path / "answers.jsonl", [*rows, {"id": "open", "kind": "open"}])
    append_lines(tmp_path / "items.jsonl", [{"id": name, "options": {"A": "gout", "B": "flu"}} for name in texts])
    forms, told = read_own(tmp_path / "answers.jsonl", tmp_path / "items.jsonl")
    assert forms.tolist() == [[1, 1], [1, 1], [1, 0], [0, 0]]
    shares = {name: told[name] for name in ("letter", "named_in_words", "neither", "cut_off")}
    assert set(shares.values()) == {0.25} and told["answers"] == 4 and told["tokens"] == 8


def test_the_ratio_over_seeds_and_its_interval_are_those_of_a_t_test_on_its_logarithm():
    from math import exp, log

    from scipy import stats

    runs = {f"seed-{i}": {"packed": {"nll": 2.0 * r}, "padded": {"nll": 2.0}} for i, r in enumerate((0.99, 1.0, 1.02))}
    found, logs = ratio_over_seeds(runs), [log(0.99), log(1.0), log(1.02)]
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert found["nll_ratio"] == pytest.approx(exp(sum(logs) / 3), abs=1e-5)
    assert found["ci95"] == pytest.approx([exp(low), exp(high)], abs=1e-5)
    assert ratio_over_seeds({"seed-1": runs["seed-1"]}) == {"nll_ratio": None, "ci95": None}


def test_jobs_run_together_with_a_log_and_a_compile_folder_each_and_are_collected(tmp_path):
    bench, ended = smollm2.Bench({}, {}, tmp_path, tmp_path), {}
    code = "import os, sys; print(os.environ['UNSLOTH_COMPILE_LOCATION']); sys.exit(int(sys.argv[1]))"

    def job(name: str, status: int):
        command = [sys.executable, "-c", code, str(status)]
        return smollm2.Job(name, command, lambda status, seconds: ended.update({name: status}))

    smollm2.run_jobs([job("plain, 4-bit", 0), job("null run", 3)], bench, at_once=2)
    assert ended == {"plain, 4-bit": 0, "null run": 3}
    said = [(tmp_path / f"{name}.log").read_text(encoding="utf-8") for name in ("plain-4-bit", "null-run")]
    assert said == [f"{tmp_path / 'plain-4-bit'}-compiled\n", f"{tmp_path / 'null-run'}-compiled\n"]


def test_a_null_run_without_an_update_is_summarised_too(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "log.csv").write_text("step,loss,grad_norm\n", encoding="utf-8")
    assert summarise(tmp_path) == {"stages": {}, "peak_gpu_reserved_gib": 0.0}
    (tmp_path / "training" / "log.csv").write_text("step,loss,grad_norm\n1,2.5,\n2,2.25,0.5\n", encoding="utf-8")
    training = summarise(tmp_path)["training"]
    assert training["losses"] == [2.5, 2.25] and training["gradients_not_finite"] == 1 and not training["finite"]


def test_a_real_model_learnt_the_form_and_no_more_is_said_of_its_knowledge_than_both_accuracies_carry():
    assert set(SMOLLM2["cases"]) == set(smollm2.CASES) and SMOLLM2["gpu"] and SMOLLM2["versions"]["unsloth"]
    for case in SMOLLM2["cases"].values():
        loss, strict, forced = (case["metrics"][name] for name in ("nll", "multiple_choice", "multiple_choice_forced"))
        assert case["exit_status"] == 0 and loss["ci95"][1] < 0 and case["metrics"]["well_formed"]["tuned"] > 0.85
        knows = next(claim["verdict"] for claim in case["claims"] if claim["claim"] == "knows more")
        assert knows == "cannot tell" and strict["p_value"] < 0.05 <= forced["p_value"]
    assert {form["exit_status"] for form in SMOLLM2["forms"].values()} == {0} and set(SMOLLM2["forms"]) == smollm2.FORMS


def test_letters_behind_thousands_of_tokens_are_those_of_the_plain_backend():
    found = json.loads((ROOT / "benchmarks" / "results" / "letters.json").read_text(encoding="utf-8"))
    assert list(found["letters"]) == ["2048", "3000", "5000"] and found["gpu"]
    for case in found["letters"].values():
        assert case["same_letter"] == case["items"] >= 8 and case["largest_difference"] < case["median_lead"] / 10
    unsloth, plain = (
        found["batch"]["unsloth"],
        found["batch"]["plain"],
    )  # written only where no more than rounding decides
    assert unsloth["prompts"] == len(found["prompt_tokens"]) and unsloth["near_ties"] <= plain["near_ties"] + 1
    assert min(found["prompt_tokens"]) < 2048 < max(found["prompt_tokens"])


def test_a_t4_run_loads_its_base_five_times_on_one_gpu():
    for name, loads in (("series-16bit", 5), ("series-4bit", 5), ("series-4bit-two", 8)):
        found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        stages = found["series"]["stages"].values()
        assert sum(sum(stage["model_loads"].values()) for stage in stages) == loads and found["exit_status"] == [0, 0]


def test_a_null_run_of_it_cannot_tell_and_shuffled_answers_leave_a_higher_loss_than_honest_ones():
    null, shuffled = SMOLLM2["controls"]["null run"], SMOLLM2["controls"]["shuffled answers"]
    assert null["verdict"] == "cannot tell" and null["metrics"]["nll"]["difference"] == pytest.approx(0, abs=1e-3)
    assert shuffled["metrics"]["nll"]["tuned"] > SMOLLM2["cases"][smollm2.FIRST]["metrics"]["nll"]["tuned"]
    claims = {claim["claim"]: claim["verdict"] for claim in shuffled["claims"]}
    assert claims["knows more"] in ("cannot tell", "worse")


def test_packed_training_of_it_ends_within_a_hundredth_of_padded_training_over_eight_seeds():
    assert len(PARITY["runs"]) >= 8 and ratio_over_seeds(PARITY["runs"])["nll_ratio"] == PARITY["nll_ratio"]
    assert 0.99 < PARITY["ci95"][0] <= PARITY["nll_ratio"] <= PARITY["ci95"][1] < 1.01
