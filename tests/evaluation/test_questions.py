"""Answers on file: reused only for the same prompt, decoding and model, and never fewer than were asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.stats import lognorm

from utils.config import load_config
from utils.errors import RunDirError
from utils.evaluation.questions import (
    TUTORIAL,
    Question,
    answer_key,
    build_questions,
    collect_references,
    current_answers,
    find_letterless,
    model_digest,
    questions_that_fit,
    read_forced,
    register,
)
from utils.files import append_lines, read_lines, write_lines
from utils.hardware import Gpu
from utils.pipeline.run_dir import open_run
from utils.pipeline.stages import BY_NAME
from utils.project import PROFILES, ROOT
from utils.schema import GenerateSection

SAMPLED, GREEDY = GenerateSection(), GenerateSection(do_sample=False)
QUESTIONS = [Question(f"q{i}", "open", f"Prompt {i} 医🩺") for i in range(3)]


def write_answers(
    path: Path, questions: list[Question], config: GenerateSection = GREEDY, model: str = "base"
) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = [{"id": q.id, "text": f"{q.prompt}!", "key": answer_key(q, config, model)} for q in questions]
    lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return lines


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 5}, {"temperature": 1.0}, {"top_p": 0.5}, {"seed": 1}, {"do_sample": False}]
)
def test_a_key_changes_with_the_decoding(change):
    other = SAMPLED.model_copy(update=change)
    assert answer_key(QUESTIONS[0], other, "base") != answer_key(QUESTIONS[0], SAMPLED, "base")


def test_a_key_changes_with_the_prompt_and_the_model():
    keys = {answer_key(question, GREEDY, model) for question in QUESTIONS for model in ("base", "tuned")}
    assert len(keys) == 6


@pytest.mark.parametrize("config", [SAMPLED, GREEDY])
def test_a_key_does_not_change_with_the_batch_size(config):
    other = config.model_copy(update={"batch_size": 3})
    assert answer_key(QUESTIONS[0], other, "base") == answer_key(QUESTIONS[0], config, "base")


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"top_p": 0.5}, {"seed": 1}])
def test_a_greedy_key_does_not_change_with_what_greedy_decoding_ignores(change):
    other = GREEDY.model_copy(update=change)
    assert answer_key(QUESTIONS[0], other, "base") == answer_key(QUESTIONS[0], GREEDY, "base")


def test_no_file_holds_no_answers(tmp_path):
    assert read_lines(tmp_path / "answers.jsonl") == []


def test_a_torn_last_line_is_dropped_wherever_the_kill_cut_it(tmp_path):
    """A cut in the middle of a character counts too: the answers are written as UTF-8, not as escapes."""
    path = tmp_path / "answers.jsonl"
    write_answers(path, QUESTIONS)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert [answer["id"] for answer in read_lines(path)] == ["q0", "q1"], whole[last:end]


def test_an_answer_with_an_odd_line_separator_stays_one_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_lines(path, [{"id": "q", "text": "a\u2028b\x85c"}])
    assert [answer["text"] for answer in read_lines(path)] == ["a\u2028b\x85c"]


def test_the_current_answers_are_those_of_these_questions_and_no_others(tmp_path):
    path = tmp_path / "baseline" / "answers.jsonl"
    write_answers(path, QUESTIONS)
    answers = current_answers(path, QUESTIONS[:2], GREEDY, "base")
    assert {name: answer["text"] for name, answer in answers.items()} == {
        "q0": "Prompt 0 医🩺!",
        "q1": "Prompt 1 医🩺!",
    }


def test_missing_answers_are_refused_with_the_count(tmp_path):
    path = tmp_path / "baseline" / "answers.jsonl"
    with pytest.raises(RunDirError, match=r"baseline/answers.jsonl holds 0 of 3 answers; run the notebook"):
        current_answers(path, QUESTIONS, GREEDY, "base")
    write_answers(path, QUESTIONS[:2])
    with pytest.raises(RunDirError, match="holds 2 of 3 answers"):
        current_answers(path, QUESTIONS, GREEDY, "base")


@pytest.mark.parametrize(("config", "model"), [(SAMPLED, "base"), (GREEDY, "tuned")])
def test_answers_of_another_decoding_or_model_count_as_missing(tmp_path, config, model):
    write_answers(tmp_path / "answers.jsonl", QUESTIONS)
    with pytest.raises(RunDirError, match="holds 0 of 3 answers"):
        current_answers(tmp_path / "answers.jsonl", QUESTIONS, config, model)


def test_letters_asked_for_by_an_older_rule_are_missing_with_their_count(tmp_path):
    """Once only what was cut off was asked for its letter: such a run cannot be scored by today's rule without its model."""
    items = pd.DataFrame([{"id": name, "options": {"A": "gout", "B": "flu"}} for name in ("cut", "ended", "stated")])
    texts = {"cut": "Hm", "ended": "Hm.</think>Rest.", "stated": "Hm.</think>The answer is B."}
    answers = {name: {"id": name, "kind": "choice", "key": name, "text": text} for name, text in texts.items()}
    key, _ = find_letterless(answers, items)["cut"]
    path = tmp_path / "baseline" / "forced.jsonl"
    path.parent.mkdir()
    append_lines(path, [{"id": "cut", "key": key, "letter": "A"}])
    with pytest.raises(RunDirError, match=r"baseline/forced\.jsonl holds 1 of 2 letters .*; run the notebook"):
        read_forced(path, answers, items)


def test_a_line_that_is_no_answer_of_ours_is_passed_over(tmp_path):
    """Without id and key it used to match whatever had none either, and was counted."""
    path = tmp_path / "answers.jsonl"
    lines = [*write_answers(path, QUESTIONS[:1]), "{}", "5", json.dumps({"id": "of another series"})]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(RunDirError, match="holds 1 of 2 answers"):
        current_answers(path, QUESTIONS[:2], GREEDY, "base")


def test_the_last_of_two_answers_to_one_question_counts(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(path, QUESTIONS[:1])
    (answer,) = read_lines(path)
    write_lines(path, [answer, answer | {"text": "Prompt?"}])
    assert current_answers(path, QUESTIONS[:1], GREEDY, "base")["q0"]["text"].endswith("?")


@pytest.mark.parametrize(
    ("text", "finish_reason", "expected"),
    [("Hm", "length", True), ("Hm", "stop", True), ("Hm.</think>So", "length", True), ("Hm.</think>B.", "length", False),
     ("Hm.</think>Gout.", "stop", True), ("Hm.</think>Arden fever.", "stop", False), ("Hm, B", "stop", True),
     ("", "stop", True), ("<think>a<think>b", "length", True)],
)  # fmt: skip
def test_every_answer_that_states_no_option_is_asked_finished_or_not(text, finish_reason, expected):
    options = {"A": "Borel fever", "B": "Arden fever"}
    answer = {"kind": "choice", "key": "k", "text": text, "finish_reason": finish_reason}
    items = pd.DataFrame([{"id": 7, "options": options}])
    assert ("7" in find_letterless({"7": answer}, items)) is expected


def test_both_kinds_of_questions_are_built_in_the_runs_own_format():
    held_out = pd.DataFrame({"id": ["a", "b"], "Question": ["Why {x}?", "How?"]})
    items = pd.DataFrame([{"id": 7, "question": "Which?", "options": {"A": "one", "B": "two"}, "gold": "B"}])
    config = load_config("demo", {"evaluate.questions": 1})
    first, second = build_questions(config, held_out, items)
    assert first == Question("a", "open", "<｜User｜>Why {x}?<｜Assistant｜><think>\n")
    assert (second.id, second.kind) == ("7", "choice") and "A. one\nB. two" in second.prompt
    assert len(build_questions(load_config("demo"), held_out, None)) == 2


T4 = Gpu("Tesla T4", 15.0, "7.5")


def room_on(monkeypatch, cards: tuple[Gpu, ...], profile: str, **overrides) -> str:
    """What 00 says of `profile` on these GPUs, where its data are as large as it asks."""
    monkeypatch.setattr("utils.evaluation.questions.gpus", lambda: cards)
    monkeypatch.setattr("utils.evaluation.questions.processes", lambda hardware: max(1, len(cards)))
    config = load_config(profile, {key.replace("__", "."): value for key, value in overrides.items()})
    kinds = ["open"] * config.evaluate.questions
    kinds += ["choice"] * sum(section.rows for section in config.evaluate.benchmarks)
    questions = [Question(str(i), kind, "?") for i, kind in enumerate([*kinds, TUTORIAL])]
    return questions_that_fit(config, questions, config.data.train_rows or 19_000)


def test_one_t4_says_how_many_questions_fit_and_what_to_set_and_two_have_room_for_all(monkeypatch):
    one, two = (room_on(monkeypatch, cards, "t4") for cards in ((T4,), (T4, T4)))
    assert one == (
        "On one Tesla T4 about 450 questions to an 8B model fit into 8 hours beside training (estimated); this run asks 616: set "
        "evaluate.benchmark.rows=434 before the first answer, or let it go on in another session."
    )
    assert two == (
        "On 2 Tesla T4s about 880 questions to an 8B model fit into 8 hours beside training (estimated); this run asks 616."
    )


def test_what_one_t4_is_told_to_set_fits(monkeypatch):
    assert room_on(monkeypatch, (T4,), "t4", evaluate__benchmark__rows=434).endswith("this run asks 450.")


@pytest.mark.parametrize("cards", [(), (Gpu("NVIDIA L4", 22.5, "8.9"),), (Gpu("NVIDIA GeForce RTX 2080", 8.0, "7.5"),)])
def test_of_another_machine_nothing_is_said_before_it_has_measured(monkeypatch, cards):
    assert room_on(monkeypatch, cards, "t4") == ""


def test_without_a_limit_every_number_of_questions_fits(monkeypatch):
    assert room_on(monkeypatch, (T4,), "t4", hardware__max_hours=None) == ""


def test_less_training_shorter_answers_and_longer_sessions_leave_room_for_more_questions(monkeypatch):
    def fit(**overrides) -> int:
        return int(re.search(r"about (\d+) questions", room_on(monkeypatch, (T4,), "t4", **overrides))[1])

    assert fit(train__max_steps=0) == 720  # all but the hour and the reserve, at 34 s a question
    more = [{"train__max_steps": 100}, {"generate__max_new_tokens": 512}, {"hardware__max_hours": 11}]
    assert all(fit(**overrides) > fit() for overrides in more)
    assert fit(train__num_train_epochs=3) == 0


def test_without_a_benchmark_no_number_of_its_items_is_asked_for(monkeypatch):
    said = room_on(monkeypatch, (T4,), "demo", hardware__max_hours=1.5, evaluate__questions=224)
    assert said.endswith("this run asks 224: let it go on in another session.")


@pytest.mark.parametrize("profile", ["t4-quick", "tutorial"])
def test_the_short_profiles_fit_on_one_t4(monkeypatch, profile):
    assert ": set" not in room_on(monkeypatch, (T4,), profile)


def test_the_reckoning_of_t4s_hours_follows_from_its_stated_lengths_and_stays_below_seven():
    """docs/kaggle-and-colab.md: 617 answers with room for 4,096 tokens, from an estimate of 317 with room for 1,536."""
    config = load_config("t4")
    asked, room = config.evaluate.questions + config.evaluate.benchmark.rows + 1, config.generate.max_new_tokens
    page = (ROOT / "docs/kaggle-and-colab.md").read_text(encoding="utf-8")
    columns = [[], []]
    for median, ends in ((900, (15, 25, 20, 75, 20, 45, 30, 108)), (1200, (25, 50, 40, 100, 35, 80, 70, 156))):
        lengths = lognorm(0.5, scale=median)
        means = [quad(lengths.sf, 0, cap)[0] for cap in (1536, room)]
        assert all(f"{mean:,.0f}" in page for mean in means)
        setup, base, tuned, training, export, base_alone, tuned_alone, training_alone = ends
        longer = asked / 317 * means[1] / means[0]
        columns[0].append([setup, longer * base, training, longer * tuned, export])
        columns[1].append([setup, longer * base_alone, training_alone, longer * tuned_alone, export])
    (low, high), (low_alone, high_alone) = columns
    for row in zip(low, high, low_alone, high_alone, strict=True):
        assert "| {:.0f} to {:.0f} min | {:.0f} to {:.0f} min |".format(*row) in page
    hours = [sum(column) / 60 for column in (low, high, low_alone, high_alone)]
    assert "| in all | {:.1f} to {:.1f} h | {:.1f} to {:.1f} h |".format(*hours) in page and hours[1] < 7
    assert "{:.1f} to {:.1f} hours".format(*hours) in (PROFILES / "t4.yaml").read_text(encoding="utf-8")


def test_where_fewer_questions_would_not_help_none_are_asked_for(monkeypatch):
    said = room_on(monkeypatch, (T4, T4), "full")
    assert said.endswith("about 0 questions to an 8B model fit into 8 hours beside training (estimated); this run asks 916: "
                         "let it go on in another session.")  # fmt: skip


def test_the_tuned_model_is_another_with_another_adapter_and_the_base_stays_the_same(tmp_path):
    run = open_run("demo", tmp_path)
    base = BY_NAME["01_baseline_inference"]
    run.write_record(base, settings=run.settings(base))
    digests = []
    for digest in ("one", "two"):
        entry = {"sha256": digest, "bytes": 1, "mtime_ns": 1}
        run.write_record(BY_NAME["04_comparison"], inputs={"training/adapter/adapter_model.safetensors": entry})
        digests.append((model_digest(run, "base"), model_digest(run, "tuned")))
    assert digests[0][0] == digests[1][0] and len({digests[0][0], digests[0][1], digests[1][1]}) == 3


def test_what_is_measured_is_registered_and_a_change_after_answers_exist_is_told_for_good(tmp_path):
    questions = [Question("a", "open", "?")]
    run = open_run("demo", tmp_path)
    run.save()
    assert register(run, questions, [])["changed_after_answers"] is False
    other = open_run("demo", tmp_path, {"generate.max_new_tokens": 8})
    assert register(other, questions, [])["changed_after_answers"] is False  # nobody has answered yet
    run.file("baseline").mkdir()
    run.file("baseline/answers.jsonl").write_text("{}\n")
    assert register(other, questions, [])["changed_after_answers"] is False  # and nothing was changed
    assert register(run, questions, [])["changed_after_answers"] is True
    assert register(run, questions, [])["changed_after_answers"] is True


def test_other_questions_in_the_same_number_are_a_change_too(tmp_path):
    run = open_run("demo", tmp_path)
    register(run, [Question("a", "open", "?")], [])
    run.file("baseline").mkdir()
    run.file("baseline/answers.jsonl").write_text("{}\n")
    assert register(run, [Question("b", "open", "?")], [])["changed_after_answers"] is True


@pytest.fixture
def answered(tmp_path):
    run = open_run("demo", tmp_path)
    run.save()
    register(run, [Question("a", "open", "?")], [])
    run.file("baseline").mkdir()
    run.file("baseline/answers.jsonl").write_text("{}\n")
    return run


@pytest.mark.parametrize("told_before", [False, True])
def test_a_deleted_manifest_does_not_take_back_that_the_measurement_was_changed(answered, told_before):
    if told_before:
        assert register(answered, [Question("b", "open", "?")], [])["changed_after_answers"] is True
    answered.manifest_path.unlink()
    again = open_run("demo", answered.path)
    again.save()
    asked = [Question("b", "open", "?")]
    assert register(again, asked, [])["changed_after_answers"] is True
    assert register(again, asked, [])["changed_after_answers"] is True


def test_a_deleted_manifest_alone_is_no_change(answered):
    answered.manifest_path.unlink()
    again = open_run("demo", answered.path)
    again.save()
    assert register(again, [Question("a", "open", "?")], [])["changed_after_answers"] is False


def test_answers_without_any_registration_count_as_changed(answered):
    answered.manifest_path.unlink()
    answered.file("data/registration.json").unlink()
    again = open_run("demo", answered.path)
    again.save()
    assert register(again, [Question("a", "open", "?")], [])["changed_after_answers"] is True


HELD_OUT = pd.DataFrame(
    [{"id": i, "Question": f"{i}?", "Complex_CoT": "Hm.", "Response": "Gout.", "answer": "gout", "choices": ["gout", "flu"],
      "group": "joints"} for i in "ab"]
)  # fmt: skip
ITEMS = pd.DataFrame([{"id": 7, "benchmark": "medqa", "options": {"A": "one", "B": "two"}, "gold": "B", "group": "7"}])


def change_cell(frame: pd.DataFrame, column: str, value: object) -> pd.DataFrame:
    return frame.assign(**{column: [*frame[column][:-1], value]})


@pytest.mark.parametrize(
    ("held_out", "items"),
    [
        (HELD_OUT, change_cell(ITEMS, "gold", "A")),
        (HELD_OUT, None),
        (change_cell(HELD_OUT, "Response", "Flu."), ITEMS),
        (change_cell(HELD_OUT, "Complex_CoT", "Ah."), ITEMS),  # the loss is over the reasoning too
        (change_cell(HELD_OUT, "Question", "Another one?"), ITEMS),  # no answer in words may be asked of this row
        (change_cell(HELD_OUT, "answer", "flu"), ITEMS),
        (change_cell(HELD_OUT, "group", "skin"), ITEMS),  # pairs that are independent count for more
        (HELD_OUT.head(1), ITEMS),
    ],
    ids=["gold", "no benchmark", "response", "reasoning", "question", "answer", "group", "rows"],
)
def test_other_references_under_the_same_questions_are_a_change_too(tmp_path, held_out, items):
    run = open_run("demo", tmp_path, {"evaluate.primary": "nll"})
    asked = [Question("a", "open", "?")]
    register(run, asked, collect_references(HELD_OUT, ITEMS))
    run.file("baseline").mkdir()
    run.file("baseline/answers.jsonl").write_text("{}\n")
    same = collect_references(HELD_OUT[::-1], ITEMS)
    assert register(run, asked, same)["changed_after_answers"] is False
    assert register(run, asked, collect_references(held_out, items))["changed_after_answers"] is True
