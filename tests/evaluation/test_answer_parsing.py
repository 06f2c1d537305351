"""Completions: only what follows the closed think block counts, and no text is too odd or too long to read."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data.prompts import EOS
from utils.evaluation import answer_parsing
from utils.evaluation.answer_parsing import (
    count_paragraphs,
    explicit_letter,
    has_bullets,
    named_choices,
    parse_completion,
)
from utils.project import ROOT

SAMPLE = ROOT.parent / "shared" / "data" / "think_completions_sample.jsonl"
LONG = 100_000
ABCD = dict.fromkeys("ABCD", "")  # options whose texts are not looked for


@contextmanager
def one_second():
    """Fail, rather than hang, where a pattern backtracks: `re` looks for signals while it matches. Of processor time."""

    def too_slow(*_):
        raise TimeoutError("took more than a second")

    before = signal.signal(signal.SIGVTALRM, too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer", "closed", "well_formed"),
    [
        ("<think>\nHmm.\n</think>\n\nGout.", "Hmm.", "Gout.", True, True),
        ("Hmm.\n</think>\n\nGout.", "Hmm.", "Gout.", True, True),
        ("</think>Gout.", "", "Gout.", True, True),
        (f"Hmm.</think>Gout.{EOS}", "Hmm.", "Gout.", True, True),
        ("<think>Hmm. The answer is B.", "Hmm. The answer is B.", "", False, False),
        ("The answer is B.", "The answer is B.", "", False, False),
        ("Hmm.</think>", "Hmm.", "", True, False),
        ("Hmm.</think> \n ", "Hmm.", "", True, False),
        (f"Hmm.</think>{EOS}", "Hmm.", "", True, False),
        ("Hmm.</think>Gout.</think>Flu.", "Hmm.", "Gout.</think>Flu.", True, False),
        ("<think>a<think>b</think>Gout.", "a<think>b", "Gout.", True, False),
        ("<think><think>a</think>Gout.", "<think>a", "Gout.", True, False),
        ("Well. <think>a</think>Gout.", "Well. <think>a", "Gout.", True, False),
        ("a</think>Gout.<think>b", "a", "Gout.<think>b", True, False),
        ("", "", "", False, False),
        ("<think>", "", "", False, False),
        ("嗯。</think>痛风。", "嗯。", "痛风。", True, True),
        ("لنفكر.</think>النقرس.", "لنفكر.", "النقرس.", True, True),
        ("🤔</think>🩺👩‍⚕️", "🤔", "🩺👩‍⚕️", True, True),
        ("< think>Hmm.</ think>Gout.", "< think>Hmm.</ think>Gout.", "", False, False),
    ],
)
def test_a_completion_is_taken_apart_at_its_closing_mark(text, reasoning, answer, closed, well_formed):
    parsed = parse_completion(text)
    assert (parsed.reasoning, parsed.answer) == (reasoning, answer)
    assert (parsed.closed, parsed.well_formed) == (closed, well_formed)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "\n", "A", " ", EOS, "医"]) | st.text(), max_size=12).map("".join)
)
def test_no_text_makes_parsing_fail(text):
    parsed = parse_completion(text)
    assert parsed.closed or not (parsed.answer or parsed.well_formed)
    assert explicit_letter(parsed.answer, ABCD) in (None, *"ABCD")
    assert set(named_choices(parsed.answer, ["A", "医"])) <= {"A", "医"}
    assert count_paragraphs(parsed.answer) >= bool(parsed.answer)
    assert has_bullets(parsed.answer) in (True, False)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is B.", "B"),
        ("the correct answer is: B", "B"),
        ("The best option is **(C)**, since it fits.", "C"),
        ("The answer would be D", "D"),
        ("\\boxed{C}", "C"),
        ("$\\boxed{\\text{C}}$", "C"),
        ("**D**", "D"),
        ("Answer: (A)", "A"),
        ("**Answer:** A", "A"),
        ("**Answer**: A", "A"),
        ("**Final Answer:**\n\nA", "A"),
        ("B", "B"),
        ("(B)", "B"),
        ("B. Metformin", "B"),
        ("Metformin fits.\n\n**B. Metformin**", "B"),
        ("The answer is B. Once more: the answer is B.", "B"),
        ("答案：B\n\nThe answer is B。", "B"),
        ("Gout is excluded. The answer is C.", "C"),
        ("A patient with gout needs rest.", None),
        ("A 45-year-old man has gout.", None),
        ("I think so. Beware.", None),
        ("The answer is Both.", None),
        ("The answer is B's cousin.", None),
        ("The answer is E.", None),
        ("The answer is b.", None),
        ("The answer is A. Or rather, the answer is B.", None),
        ("\\boxed{A} or \\boxed{B}", None),
        ("A\n\nB", None),
        ("Gout.", None),
        ("", None),
    ],
)
def test_a_letter_counts_where_it_is_stated_explicitly_and_alone(answer, letter):
    assert explicit_letter(answer, ABCD) == letter


def test_only_the_items_own_letters_count():
    assert explicit_letter("The answer is E.", ABCD | {"E": ""}) == "E"
    assert explicit_letter("The answer is D.", {"A": "", "B": ""}) is None


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("This patient has stress incontinence.", "A"),
        ("STRESS INCONTINENCE", "A"),
        ("The patient needs 5 mg. Not 50 mg.", "C"),
        ("It is not an overactive bladder. Stress incontinence fits.", "A"),
        ("It is not stress incontinence.", None),
        ("It isn't stress incontinence.", None),
        ("Stress incontinence is unlikely.", None),
        ("Stress incontinence, rather than an overactive bladder.", None),
        ("Stress incontinence or an overactive bladder.", None),
        ("Distress incontinence.", None),
        ("The answer is B: stress incontinence.", "B"),  # a letter that is stated goes before a text
        ("The answer is A or B. Stress incontinence.", None),
        ("50 mg", "D"),
        ("50-mg", "D"),
        ("Stress incontinence fits, as nothing is infected and no overactive bladder was found.", "A"),
        ("The most likely cause is stress incontinence. Overactive bladder is another disease.", "A"),
        ("An overactive bladder is common. Therefore, she has stress incontinence.", "A"),
        ("Start with an examination. Stress incontinence can be treated by exercise.", None),
        ("The best test is cystometry. An overactive bladder would show there.", None),
        ("The best answer is stress incontinence. The right one is an overactive bladder.", None),
        ("", None),
    ],
)
def test_an_option_named_in_full_and_alone_counts_as_its_letter_unless_it_is_negated(answer, letter):
    options = {"A": "Stress incontinence", "B": "Overactive bladder.", "C": "5 mg", "D": "50 mg"}
    assert explicit_letter(answer, options) == letter


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"A": "yes", "B": "no", "C": "maybe"}, "The answer is yes."),  # "The answer is no." would be none
        ({"A": "yes", "B": "no", "C": "maybe"}, "No, it did not help. Maybe larger trials would show more."),
        ({"A": "No treatment", "B": "Aspirin"}, "No treatment is needed. Aspirin would only add risk."),
    ],
)
def test_where_an_option_negates_only_a_letter_counts(options, answer):
    assert explicit_letter(answer, options) is None
    assert explicit_letter(f"{answer} The answer is A.", options) == "A"


def test_a_name_is_found_however_its_apostrophe_is_written_and_across_the_stop_in_it():
    options = {"A": "Fabry’s disease", "B": "E. coli infection", "C": 'Gout\n"'}
    answers = ("It is Fabry's disease.", "It is an E. coli infection.", "It is gout.")
    assert [explicit_letter(answer, options) for answer in answers] == ["A", "B", "C"]


def test_a_text_that_two_options_share_names_neither():
    assert explicit_letter("It is gout.", {"A": "Gout", "B": "gout"}) is None


@pytest.mark.parametrize("text", ["<think>So the answer is B.", "The answer is B. Wait", "\\boxed{B}"])
def test_a_letter_inside_unfinished_reasoning_does_not_count(text):
    assert explicit_letter(text, ABCD) == "B"
    assert explicit_letter(parse_completion(text).answer, ABCD) is None


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("It is Arden fever.", ["Arden fever"]),
        ("it is ARDEN FEVER!", ["Arden fever"]),
        ("It is fever.", ["fever"]),
        ("Arden fever, not gout.", ["Arden fever", "gout"]),
        ("Gouty feverish Ardens.", []),
        ("(gout)", ["gout"]),
        ("", []),
    ],
)
def test_names_count_as_whole_words_whatever_their_case_and_the_longer_one_wins(answer, named):
    assert named_choices(answer, ["fever", "Arden fever", "gout"]) == named


def test_names_with_marks_that_patterns_know_are_taken_literally():
    assert named_choices("Give IL-2 (alpha) now.", ["IL-2 (alpha)", "IL.2"]) == ["IL-2 (alpha)"]
    assert named_choices("这是痛风", ["这是痛风", "流感"]) == ["这是痛风"]


@pytest.mark.parametrize(("answer", "count"), [("", 0), ("a", 1), ("a\nb", 1), ("a\n\nb", 2), ("a\n \t\n\n\nb\n\n", 2)])
def test_paragraphs_are_blocks_between_blank_lines(answer, count):
    assert count_paragraphs(answer) == count


@pytest.mark.parametrize(
    ("answer", "bullets"),
    [
        ("- a", True),
        ("Text:\n  * a", True),
        ("1. a", True),
        ("2) a", True),
        ("• a", True),
        ("A well-known drug - it helps.", False),
        ("-5 degrees", False),
        ("3.5 mg", False),
        ("**Gout**", False),
        ("", False),
    ],
)
def test_bullets_are_lines_that_start_as_list_items(answer, bullets):
    assert has_bullets(answer) is bullets


@pytest.mark.parametrize(
    "filler",
    [
        "医",
        "word ",
        "\n",
        " \n",
        " ",
        "*",
        "(",
        "\\boxed{",
        "The answer is ",
        "Answer:\n",
        "<think>",
        "</think>",
        "most ",
        ", as",
        "1. ",
        "-\n",
    ],
)
@pytest.mark.parametrize("opening", ["Well.", "The answer:"])
def test_a_hundred_thousand_characters_of_anything_are_read_within_a_second(filler, opening):
    """A model that loops fills its cap with one character; scoring must not hang on it."""
    text = f"Hmm.</think>{opening}" + filler * (LONG // len(filler)) + "fever"
    with one_second():
        answer = parse_completion(text).answer
        explicit_letter(answer, ABCD)
        explicit_letter(answer, {"A": "fever", "B": "Arden fever"})
        named_choices(answer, ["fever", "Arden fever"])
        count_paragraphs(answer)
        has_bullets(answer)


def test_strict_scoring_never_credits_a_real_completion_that_was_cut_off():
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE} is not here; it holds real completions of a reasoning model")
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").split("\n") if line]
    cut = [row for row in rows if "</think>" not in row["completion"]]
    assert len(cut) > 50
    for row in cut:
        assert explicit_letter(parse_completion(row["completion"]).answer, row["options"]) is None


def test_nearly_every_real_completion_that_was_closed_states_a_letter():
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE} is not here; it holds real completions of a reasoning model")
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").split("\n") if line]
    closed = [row for row in rows if "</think>" in row["completion"]]
    letters = [explicit_letter(parse_completion(row["completion"]).answer, row["options"]) for row in closed]
    assert sum(letter is not None for letter in letters) >= 0.95 * len(closed)


@pytest.mark.parametrize(("name", "example"), [way[:2] for way in answer_parsing._WAYS])
def test_each_pattern_reads_the_example_beside_it(name, example):
    ways, _ = answer_parsing._compile("ABCD")
    assert ways[name].search(example)["letter"] == "B" == explicit_letter(example, ABCD)
