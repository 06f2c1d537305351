"""Letters: read where they are stated, and nowhere else, in the many ways in which models state them."""

from __future__ import annotations

import hashlib
import json

import pytest

from utils.evaluation.answer_parsing import any_letter, explicit_letter, parse_completion
from utils.project import ROOT

SAMPLE = ROOT.parent / "shared" / "data" / "think_completions_sample.jsonl"
ITEMS = ROOT.parent / "shared" / "data" / "medqa_sample.jsonl"
LETTERLESS = ROOT / "tests" / "labels" / "smollm2_answers.jsonl"  # see the README beside it
LABELS = json.loads((ROOT / "tests" / "labels" / "think_completions.json").read_text(encoding="utf-8"))
STATEMENTS = [
    ("**Answer: B**", "B"),
    ("The correct answer is **B. text**", "B"),
    ("**Final Answer:** \\boxed{B}", "B"),
    ("The answer is (B).", "B"),
    ("Answer: **(C)**", "C"),
    ("B", "B"),
    ("**B**", "B"),
    ("B) text", "B"),
    ("Correct option: D", "D"),
    ("The best option is C, because", "C"),
    ("Therefore, option B is correct.", "B"),
    ("(A) is the correct answer", "A"),
    ("A is the correct answer.", "A"),
    ("The most likely diagnosis is **C. Foo**.", "C"),
    ("The answer is B, not A.", "B"),
    ("Options A and B are wrong; the answer is C", "C"),
    ("The correct choice is: **E**", "E"),
    ("I'd go with B", "B"),
    ("答案是 B。", "B"),
    ("答案:B", "B"),
    ("Final Answer: B", "B"),
    ("### Final Answer\n**B**", "B"),
    ("The answer is: $\\boxed{\\text{B}}$", "B"),
    ("A is incorrect because x. The answer is B.", "B"),
    ("B is the correct answer", "B"),
    ("Vitamin A is needed.", None),
    ("The answer is a combination of A and B.", None),
    ("Hepatitis B is likely.", None),
    ("A 45-year-old man has gout.", None),
    ("The answer is not B.", None),
    ("The answer is either A or B.", None),
    ("The answer is A or B.", None),
    ("The answer is A, or maybe B.", None),
    ("A: no. B: yes. The answer is B", "B"),
    ("A. wrong\nB. right\nC. wrong", None),
    ("**Answer:**\n\nB. Foo", "B"),
    ("**Correct Answer: C. Foo bar**\n\nA. is wrong because\nB. is wrong", "C"),
    ("The correct answer is option **D**: text", "D"),
    ('The answer is "B".', "B"),
    ("Answer - B", "B"),
    ("The answer is probably C.", "C"),
    ("The answer should be C.", "C"),
    ("The correct answer is therefore C.", "C"),
    ("The answer is E. coli infection.", None),
    ("The answer is Vitamin D.", None),
    ("choice A would be wrong", None),
    ("Option A is incorrect. Option C is the right one.", "C"),
    ("<answer>B</answer>", "B"),
    ("The answer is **B**.\n\nOption A is wrong; option C is wrong.", "B"),
    ("The answer is B.\n\nThe answer is A.", None),
    ("The correct answers are A and C.", None),
    ("Answer: A and C", None),
    ("Answer: A/C", None),
    ("Answer B is correct; answer A isn't.", "B"),
    ("My answer: **C) Metformin**", "C"),
    ("So the best answer here would be B (Metformin).", "B"),
    ("The answer is A.", "A"),
    ("the answer is a.", None),
    ("The answer is I", None),
    ("It is A's fault", None),
    ("**B. Foo**\n\nExplanation: option A is out.", "B"),
    ("C. Foo\n", "C"),
    ("Final answer: \\(\\boxed{C}\\)", "C"),
    ("The answer is \\textbf{C}", "C"),
    ("The final answer is $C$", "C"),
    ("Correct Answer: `C`", "C"),
    ("The answer is B: it isn't A or C.", "B"),
    ("Answer: A 45-year-old would need an MRI.", None),
    ("The answer is A patient-centred approach.", None),
    ("The answer is A because of x", "A"),
    ("The answer is B Metformin", "B"),
    ("The incorrect answer is A.", None),
    ("Option B is not correct.", None),
    ("B is not the correct answer.", None),
    ("The answer to this question is **D**.", "D"),
    ("The most appropriate answer in this case is: C", "C"),
    ("A and B are both right.", None),
    ("D", "D"),
    ("D\n\nBecause A, B and C are wrong.", "D"),
    ("Therefore, the correct answer is:\n\n**B. Aortic**", "B"),
    ("Answer choice C is correct.", "C"),
    ("The answer choice A is wrong.", None),
    ("The correct answer is A. Aortic stenosis. B is wrong.", "A"),
    ("الجواب: B", "B"),
    ("The answer is B and C is wrong.", "B"),
    ("Based on the above, the answer is **(D) None of the above**.", "D"),
    ("The answer is A – because", "A"),
    ("The answer is blood type A.", None),
    ("One option is B.", None),
    ("An alternative option would be C.", None),
    ("Answer:\nC", "C"),
    ("Answer:\n\n**C**", "C"),
    ("**C**: foo", "C"),
    ("(C)", "C"),
    ("[C]", "C"),
    ("The answer is vitamin A deficiency", None),
    ("Select B.", "B"),
    ("選 B", "B"),
    ("选B", "B"),
    ("The final answer: \\( B \\)", "B"),
    ("Amphotericin B is the most appropriate treatment.", None),
    ("Hepatitis B is the correct diagnosis.", None),
    ("Vitamin D is the best choice.", None),
    ("Botulinum toxin A is the best treatment.", None),
    ("The answer is C-reactive protein.", None),
    ("The answer is B-cell lymphoma.", None),
    ("The answer is D-dimer.", None),
    ("The answer is B natriuretic peptide.", None),
    ("The answer is C peptide measurement.", None),
    ("Do not choose B.", None),
    ("You should not pick A.", None),
    ("I would not go with A.", None),
    ("不选B", None),
    ("Answer: A, B", None),
    ("Option B (metformin) is the correct answer.", "B"),
    ("B (metformin) is correct.", "B"),
    ("The correct answer (B) is metformin.", "B"),
    ("The correct answer, B, is metformin.", "B"),
    ("Of these, the correct one is C.", "C"),
    ("The most appropriate next step is C) MRI.", "C"),
    ("The correct diagnosis is B. Graves disease.", "B"),
    ("The answer seems to be C.", "C"),
    ("The answer has to be C.", "C"),
    ("Answer B", "B"),
    ("Metformin should be given (Option B).", "B"),
    ("Option: B", "B"),
    ("答案是A因为这样", "A"),
    ("B选项正确", "B"),
    ("正确选项是B", "B"),
    ("The answer is Ｂ.", "B"),
    ("The answer is A (metformin).", "A"),
]


@pytest.mark.parametrize(("answer", "letter"), STATEMENTS)
def test_a_letter_is_read_where_it_is_stated(answer, letter):
    assert explicit_letter(answer, dict.fromkeys("ABCDE", "")) == letter


def test_on_real_completions_next_to_no_letter_is_invented_and_none_that_was_given_is_missed():
    """Labels assigned by reading: each closed completion of this sample ends in its letter, each other is unfinished."""
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE} is not here; it holds real completions of a reasoning model")
    rows = _read_lines(SAMPLE)
    assert len(LABELS) >= 150 and {f"{row['task']}/{row['id']}" for row in rows} == set(LABELS)
    invented = missed = 0
    for row in rows:
        label = LABELS[f"{row['task']}/{row['id']}"]
        found = explicit_letter(parse_completion(row["completion"]).answer, row["options"])
        invented += found is not None and found != label
        missed += label is not None and found is None
    given = sum(label is not None for label in LABELS.values())
    assert invented / len(rows) <= 0.005 and missed / given <= 0.01, (invented, missed)


def test_of_real_answers_without_a_letter_next_to_none_gets_another_option_than_the_one_it_names():
    """SmolLM2's, base and fine-tuned, labelled by reading. Before a place in the answer counted it was 10 of 235."""
    if not ITEMS.exists():
        pytest.skip(f"{ITEMS} is not here; it holds the options")
    options = {item["id"]: item["options"] for item in _read_lines(ITEMS)}
    rows, wrong, missed = _read_lines(LETTERLESS), {1: 0, 2: 0, 3: 0}, 0
    for row in rows:
        choices = options[row["id"]]
        text = json.dumps(choices, sort_keys=True, ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == row["options_sha256"]
        found = explicit_letter(row["answer"], choices)
        wrong[row["draw"]] += found is not None and found != row["label"]
        missed += row["in_full"] and found is None
    in_full = sum(row["in_full"] for row in rows)
    assert len(rows) >= 200 and in_full >= 80
    assert wrong[1] <= 1 and wrong[3] == 0 and sum(wrong.values()) <= 0.01 * len(rows), wrong
    assert missed <= 0.08 * in_full, missed  # and asked for their letter by the logits


def _read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_scorer_that_takes_any_letter_flatters():
    assert any_letter("Hmm, B looks right. But wait", "ABCD") == "B"
    assert explicit_letter(parse_completion("Hmm, B looks right. But wait").answer, dict.fromkeys("ABCD", "")) is None
    assert any_letter("no letter at all", "ABCD") is None


def test_the_notebook_quotes_the_measured_shares():
    evidence = json.loads((ROOT / "benchmarks" / "results" / "extraction.json").read_text(encoding="utf-8"))
    text = (ROOT / "notebooks" / "04_comparison.ipynb").read_text(encoding="utf-8")
    assert evidence["any_letter_accuracy"] > evidence["strict_accuracy"] + 0.05
    for key in ("cut_off", "explicit_letter", "strict_accuracy", "any_letter_accuracy", "published_scorer_accuracy"):
        assert f"{evidence[key]:.1%}".replace("%", " %") in text, key
