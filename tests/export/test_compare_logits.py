"""What is compared, and when two models count as one."""

from __future__ import annotations

import copy

import pytest
import torch

from utils.export.compare_logits import (
    NEW_TOKENS,
    ROUNDED,
    Continuations,
    check_tolerance,
    choose_tolerance,
    compare,
    continue_greedily,
    follow,
)

PROMPTS = [f"<｜User｜>{text}<｜Assistant｜><think>\n" for text in ("a", "b", "why so", "what of that", "a cough")]

TOLERANCES = ("exact", *ROUNDED)


@pytest.fixture(scope="module")
def led(tiny_model):
    return continue_greedily(*tiny_model, PROMPTS, "here")


def test_prompts_together_get_what_each_gets_alone(tiny_model, led):
    model, tokenizer = tiny_model
    for number, prompt in enumerate(PROMPTS):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert led.tokens[number] == alone[0, inputs.input_ids.shape[1] :].tolist()


def test_a_model_follows_itself_and_what_is_saved_is_what_was(tiny_model, led, tmp_path):
    followed = follow(*tiny_model, PROMPTS, led, "here")
    followed.save(tmp_path / "kept.safetensors")
    figures = compare(led, Continuations.load(tmp_path / "kept.safetensors"))
    assert figures["identical"] == figures["prompts"] == len(PROMPTS)
    assert figures["largest_logit_difference"] < 1e-5 and figures["largest_margin_lost"] == 0
    assert check_tolerance(figures, "exact") is None


def test_another_model_is_told_apart_by_logits_and_by_tokens(tiny_model, led):
    model, tokenizer = copy.deepcopy(tiny_model[0]), tiny_model[1]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 0.01
    figures = compare(led, follow(model, tokenizer, PROMPTS, led, "here"))
    assert "logits differ" in check_tolerance({**figures, "identical": len(PROMPTS)}, "exact")
    torch.manual_seed(5)
    torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.weight, std=0.5)
    figures = compare(led, follow(model, tokenizer, PROMPTS, led, "here"))
    assert "the same tokens for" in check_tolerance(figures, "exact")
    assert "of their spread" in check_tolerance(figures, "float16") and "of their spread" in check_tolerance(
        figures, "4-bit"
    )


def continuations(tokens, best, logits=((0.0, 1.0),)):
    filled = torch.full((len(tokens), NEW_TOKENS, 2), float("nan"))
    for row, pairs in enumerate(best):
        filled[row, : len(pairs)] = torch.tensor(pairs)
    return Continuations(tokens, torch.tensor(logits), filled)


def test_where_they_part_the_references_margin_is_what_counts():
    reference = continuations([[4, 5, 6]], [[(9.0, 1.0), (3.0, 2.5), (8.0, 0.0)]])
    other = continuations([[4, 7]], [[(9.5, 1.0), (2.9, 2.8)]])
    figures = compare(reference, other)
    assert figures["identical"] == 0 and figures["mean_common_tokens"] == 1.0
    assert figures["largest_margin_lost"] == 0.5 and figures["largest_logit_difference"] == 0.5


def test_an_end_that_comes_early_is_no_agreement():
    reference = continuations([[4, 5]], [[(9.0, 1.0), (7.0, 3.0)]])
    figures = compare(reference, continuations([[4]], [[(9.0, 1.0)]]))
    assert figures["identical"] == 0 and figures["largest_margin_lost"] == 4.0


def test_in_sixteen_bit_only_an_undecided_token_may_turn():
    figures = {"prompts": 2, "identical": 1, "relative_logit_difference": 0.01, "largest_logit_difference": 0.1}
    assert check_tolerance({**figures, "largest_margin_lost": 0.19}, "float16") is None
    for level in ("float16", "bfloat16"):
        assert "tokens part where the best was 0.30 ahead" in check_tolerance(
            {**figures, "largest_margin_lost": 0.3}, level
        )


def test_the_tolerance_follows_from_the_coarsest_dtype_compared():
    assert choose_tolerance({"float32"}) == "exact"
    assert choose_tolerance({"float32", "bfloat16", "float16"}) == "bfloat16"
    assert choose_tolerance({"float16", "4-bit"}) == "4-bit"


def test_bfloat16_rounds_more_than_float16():
    """8B shapes with random weights came out at 0.083 of the spread, which the tolerance of float16 refused."""
    figures = {"prompts": 8, "identical": 0, "largest_logit_difference": 0.52, "largest_margin_lost": 0.09}
    assert check_tolerance({**figures, "relative_logit_difference": 0.083}, "bfloat16") is None
    assert "0.08 of their spread, at most 0.05" in check_tolerance(
        {**figures, "relative_logit_difference": 0.083}, "float16"
    )
    assert "at most 0.15 is rounding" in check_tolerance({**figures, "relative_logit_difference": 0.2}, "bfloat16")


def test_a_difference_that_is_no_number_never_passes():
    figures = {"prompts": 1, "identical": 1, "largest_margin_lost": 0.0}
    broken = {**figures, "relative_logit_difference": float("nan"), "largest_logit_difference": float("nan")}
    assert all(check_tolerance(broken, level) for level in TOLERANCES)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "best",
    [[(9.0, 1.0), (NAN, NAN), (8.0, 0.0)], [(9.0, 1.0), (INF, 1.0), (8.0, 0.0)], [(NAN, NAN), (7.0, 3.0), (8.0, 0.0)]],
)
@pytest.mark.parametrize("level", TOLERANCES)
def test_a_step_that_is_no_finite_number_after_the_first_token_is_a_mismatch(best, level):
    sound = [(9.0, 1.0), (7.0, 3.0), (8.0, 0.0)]
    reference, other = continuations([[4, 5, 6]], [sound]), continuations([[4, 5, 6]], [best])
    assert "no finite number" in check_tolerance(compare(reference, other), level)
    assert "no finite number" in check_tolerance(compare(other, reference), level)


def test_a_margin_that_is_no_finite_number_is_a_mismatch():
    reference = continuations([[4, 5], [4, 5]], [[(9.0, 1.0), (NAN, 3.0)], [(9.0, 1.0), (7.0, 3.0)]], [(0.0, 1.0)] * 2)
    other = continuations([[4, 7], [4, 5]], [[(9.0, 1.0), (7.0, 3.0)]] * 2, [(0.0, 1.0)] * 2)
    assert "no finite number" in check_tolerance(compare(reference, other), "float16")
