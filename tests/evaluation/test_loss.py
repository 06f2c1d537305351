"""Losses are exact, no row is cut, and a forced letter is what a computation by hand gives."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from utils.data.prompts import format_row
from utils.errors import ModelError, OutOfMemory, RunDirError
from utils.evaluation import loss as loss_module
from utils.evaluation.loss import (
    check_same_base,
    completion_loss,
    forced_letters,
    format_letter_prompt,
    letter_logprobs,
    measure_letters,
    read_letters,
    tokenize_row,
)
from utils.evaluation.questions import Question, read_forced
from utils.files import read_lines

ROWS = [
    {"Question": f"A man has {'a dry cough and ' * i}a red rash.", "Complex_CoT": "It fits.\nYes " * (i + 1), "Response": "R"}
    for i in range(7)
]  # fmt: skip


def table() -> pd.DataFrame:
    pairs = [format_row(row, "native") for row in ROWS]
    return pd.DataFrame(
        {"id": [f"q{i}" for i in range(7)], "prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]}
    )


def test_a_row_is_bos_prompt_reasoning_response_eos_each_part_in_its_place(tiny_model):
    _, tokenizer = tiny_model
    prompt, completion = format_row({"Question": "Q?", "Complex_CoT": "Because.", "Response": "So it is."}, "native")
    row = tokenize_row(tokenizer, prompt, completion)
    assert row["part"] == sorted(row["part"])
    texts = {
        code: tokenizer.decode([i for i, p in zip(row["input_ids"], row["part"], strict=True) if p == code])
        for code in (0, 1, 2)
    }
    assert texts[0] == tokenizer.bos_token + prompt
    assert texts[1] == "Because.\n</think>" and texts[2] == "\n\nSo it is." + tokenizer.eos_token


def test_the_parts_loss_adds_up_to_what_transformers_computes(tiny_model):
    model, tokenizer = tiny_model
    nll = completion_loss(model, tokenizer, table(), max_length=4096)
    for i, row in enumerate(table().itertuples()):
        encoded = tokenize_row(tokenizer, row.prompt, row.completion)
        ids = torch.tensor([encoded["input_ids"]])
        labels = ids.clone()
        labels[0, [p == 0 for p in encoded["part"]]] = -100
        with torch.no_grad():
            mean = model(input_ids=ids, labels=labels).loss.item()
        counted = nll["reasoning_tokens"][i] + nll["response_tokens"][i]
        assert counted == sum(p > 0 for p in encoded["part"])
        assert (nll["reasoning_nll"][i] + nll["response_nll"][i]) / counted == pytest.approx(mean, rel=1e-5)


def test_a_row_beyond_the_limit_is_left_out_and_never_cut(tiny_model):
    model, tokenizer = tiny_model
    lengths = [len(tokenize_row(tokenizer, r.prompt, r.completion)["input_ids"]) for r in table().itertuples()]
    limit = sorted(lengths)[3]
    nll = completion_loss(model, tokenizer, table(), max_length=limit)
    assert list(nll["id"]) == [f"q{i}" for i, length in enumerate(lengths) if length <= limit]


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_losses(tiny_model, monkeypatch):
    expected, real = completion_loss(*tiny_model, table(), 4096), loss_module._loss_of_batch

    def small_memory(model, tokenizer, batch):
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokenizer, batch)

    monkeypatch.setattr(loss_module, "_loss_of_batch", small_memory)
    pd.testing.assert_frame_equal(completion_loss(*tiny_model, table(), 4096), expected, rtol=1e-5)


def test_a_row_that_never_fits_is_a_sentence(tiny_model, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loss_module, "_loss_of_batch", no_memory)
    with pytest.raises(OutOfMemory, match="max_seq_length"):
        completion_loss(*tiny_model, table(), 4096)


@pytest.fixture
def adapted(tiny_model):
    """The tiny model with LoRA weights that change what it says; taken off again afterwards."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(tiny_model[0], LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    yield model.eval(), tiny_model[1]
    model.unload()


def test_with_the_adapter_switched_off_the_base_is_recognised(tiny_model, adapted):
    with adapted[0].disable_adapter():
        baseline = completion_loss(*adapted, table(), 4096)
    assert check_same_base(*adapted, table(), baseline) < 1e-5
    changed = completion_loss(*adapted, table(), 4096)
    assert abs(changed["reasoning_nll"] / baseline["reasoning_nll"] - 1).max() > 1e-3  # the adapter does do something


def test_another_base_than_the_baselines_is_refused(adapted):
    with adapted[0].disable_adapter():
        baseline = completion_loss(*adapted, table(), 4096)
    baseline["reasoning_nll"] *= 1.05
    with pytest.raises(ModelError, match="not the base model that answered in 01"):
        check_same_base(*adapted, table(), baseline)


ITEMS = pd.DataFrame([{"id": "m1", "options": {"A": "one", "B": "two", "C": "three"}, "gold": "B"}])
QUESTIONS = [Question("m1", "choice", "Which one?<think>\n")]


def unfinished(text: str, reason: str = "length") -> list[dict]:
    return [{"id": "m1", "kind": "choice", "key": "k", "text": text, "finish_reason": reason}]


def force(tiny_model, folder, answers, items=ITEMS) -> list[dict]:
    """What the file holds after these answers' letters were forced."""
    forced_letters(*tiny_model, QUESTIONS, answers, items, folder / "forced.jsonl")
    return read_lines(folder / "forced.jsonl")


@pytest.mark.parametrize(
    ("text", "closing", "reason"),
    [
        ("It could be A", "\n</think>\n\nThe answer is", "length"),
        ("Hm.</think>So", "\n\nThe answer is", "length"),
        ("Hm.</think>Gout.", "\n\nThe answer is", "stop"),  # finished, with no letter: SmolLM2 after fine-tuning
    ],
)
def test_a_forced_letter_is_the_likeliest_behind_what_the_model_wrote(tiny_model, tmp_path, text, closing, reason):
    """By hand: one forward pass, log-softmax at the last place, the letters' tokens summed."""
    model, tokenizer = tiny_model
    (row,) = force(tiny_model, tmp_path, unfinished(text, reason))
    ids = tokenizer("Which one?<think>\n" + text + closing + " ")["input_ids"]
    space = tokenizer.encode(" A", add_special_tokens=False)
    assert len(space) == 2  # this small vocabulary writes the space by itself; both must be handled
    with torch.no_grad():
        before, last = torch.log_softmax(model(torch.tensor([ids])).logits[0, -2:], dim=-1)
    own = {x: tokenizer.encode(f" {x}", add_special_tokens=False)[-1] for x in "ABC"}
    expected = {x: float(before[space[0]] + last[token]) for x, token in own.items()}
    assert row["logprobs"] == pytest.approx(expected, abs=1e-5)
    assert row["letter"] == max(expected, key=expected.get)


@pytest.mark.parametrize(
    ("text", "reason"), [("Hm.</think>The answer is B.", "stop"), ("Hm.</think>It is two.", "stop"), ("Hm.</think>B", "length")]
)  # fmt: skip
def test_an_answer_that_states_an_option_is_not_asked_for_its_letter(tiny_model, tmp_path, text, reason):
    assert force(tiny_model, tmp_path, unfinished(text, reason)) == []
    assert (tmp_path / "forced.jsonl").read_text() == ""


def test_a_forced_letter_on_file_is_not_computed_again(tiny_model, tmp_path, monkeypatch):
    first = force(tiny_model, tmp_path, unfinished("Hm"))
    monkeypatch.setattr(loss_module, "letter_logprobs", None)
    assert force(tiny_model, tmp_path, unfinished("Hm")) == first


def test_without_a_benchmark_nothing_is_forced(tiny_model, tmp_path):
    answers = [{"id": "q", "kind": "open", "key": "k", "text": "Hm", "finish_reason": "length"}]
    assert force(tiny_model, tmp_path, answers, None) == []


def test_another_text_under_the_same_key_is_forced_anew(tiny_model, tmp_path, monkeypatch):
    force(tiny_model, tmp_path, unfinished("Hm"))
    monkeypatch.setattr(loss_module, "letter_logprobs", lambda *_: {"C": 0.0})
    other = unfinished("Something else")
    assert force(tiny_model, tmp_path, other)[1]["letter"] == "C"
    assert read_forced(tmp_path / "forced.jsonl", {"m1": other[0]}, ITEMS) == {"m1": "C"}


class Failing:
    device = torch.device("cpu")

    def __init__(self, error: Exception):
        self.error = error

    def __call__(self, **_):
        raise self.error


def test_an_answer_that_does_not_fit_with_its_cue_is_a_sentence(tiny_model):
    with pytest.raises(
        OutOfMemory, match=r"does not fit into memory to be asked for its letter; lower generate.max_new_tokens"
    ):
        letter_logprobs(Failing(torch.OutOfMemoryError("CUDA out of memory")), tiny_model[1], "Hm", "AB")
    with pytest.raises(RuntimeError, match=r"^shape$"):  # anything else is no lack of memory
        letter_logprobs(Failing(RuntimeError("shape")), tiny_model[1], "Hm", "AB")


TEXTS = ["Aspirin", "A rash, 医🩺", "Rest", "{{ none }}", "Surgery", "Water", "Salt", "Iron", "Sleep", "Heat"]


def item(number: int, options: int, gold: str) -> dict:
    texts = {"ABCDEFGHIJ"[i]: TEXTS[(i + number) % 10] for i in range(options)}
    question = f"A man has {'a dry cough and ' * number}a red rash. What helps?"
    return {"id": f"m{number}", "question": question, "options": texts, "gold": gold}


@pytest.fixture
def items() -> pd.DataFrame:
    """Three to ten options, and two items that differ in nothing but their id and right letter."""
    twins = [{**item(3, 5, gold), "id": name} for name, gold in (("twin-1", "B"), ("twin-2", "E"))]
    return pd.DataFrame([item(0, 3, "A"), *twins, item(1, 4, "D"), item(2, 5, "C"), item(5, 10, "J"), item(9, 4, "A")])


def test_letters_are_read_as_the_evaluation_harness_reads_them(tiny_model, items, tmp_path):
    """A cross-check: lm-eval sums over the tokens of " A", where a vocabulary has no token of its own for it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    found = measure_letters(*tiny_model, items, tmp_path / "probe.jsonl", "model")
    assert list(found["group"]) == list(items["id"])  # as 00 once froze them, without groups
    harness = HFLM(pretrained=tiny_model[0], tokenizer=tiny_model[1], batch_size=1, add_bos_token=True)
    for row, letters in zip(items.itertuples(), found.itertuples(), strict=True):
        prompt = format_letter_prompt(row.question, row.options)
        asked = [Instance("loglikelihood", {}, (prompt, f" {letter}"), i) for i, letter in enumerate(row.options)]
        theirs = torch.tensor([nats for nats, _ in harness.loglikelihood(asked, disable_tqdm=True)])
        ours = torch.tensor([letters.logprobs[letter] for letter in row.options])
        assert torch.allclose(theirs, ours, atol=1e-4)
        assert letters.letter == list(row.options)[int(theirs.argmax())] and letters.correct == (
            letters.letter == row.gold
        )


def test_the_prompt_is_that_of_the_harness_s_own_medqa(items):
    from lm_eval.tasks.medqa import preprocess_medqa

    row = items[items["id"] == "m1"].iloc[0]
    theirs = {"sent1": row.question, **{f"ending{i}": text for i, text in enumerate(row.options.values())}}
    assert format_letter_prompt(row.question, row.options) == preprocess_medqa.doc_to_text(theirs)


def test_letters_on_file_are_not_read_again_and_a_kill_loses_none(tiny_model, items, tmp_path, monkeypatch):
    path = tmp_path / "new" / "probe.jsonl"
    first = measure_letters(*tiny_model, items, path, "model")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    asked, real = [], letter_logprobs
    monkeypatch.setattr(loss_module, "letter_logprobs", lambda *a: asked.append(a[2]) or real(*a))
    pd.testing.assert_frame_equal(measure_letters(*tiny_model, items, path, "model"), first)
    assert len(asked) == len(items) - 4 and list(first["id"]) == list(items["id"])


@pytest.mark.parametrize("change", ["model", "question", "options", "gold"])
def test_letters_of_another_model_or_other_items_are_missing(tiny_model, items, tmp_path, change):
    path, few = tmp_path / "probe.jsonl", items.head(2).copy()
    measure_letters(*tiny_model, few, path, "model")
    if change == "options":
        few["options"] = [{**options, "A": "Else"} for options in few["options"]]
    elif change != "model":
        few[change] = "C" if change == "gold" else few[change] + "?"
    with pytest.raises(
        RunDirError,
        match=r"probe\.jsonl holds 0 of 2 letters, with evaluate\.letter_logprobs on; run the notebook"
        if change in ("model", "question", "options")
        else r"holds \d of 2 letters",
    ):
        read_letters(few, path, "other" if change == "model" else "model")


def test_a_log_probability_that_is_not_finite_is_a_sentence(tiny_model):
    class Broken:
        device = torch.device("cpu")

        def __call__(self, input_ids, **_):
            return type("Output", (), {"logits": torch.full((*input_ids.shape, len(tiny_model[1])), float("nan"))})

    with pytest.raises(ModelError, match=r"try another hardware\.dtype"):
        letter_logprobs(Broken(), tiny_model[1], "Hm", "AB")
