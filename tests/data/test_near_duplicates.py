"""Near copies: reworded questions are found, unrelated ones are not, in any script and in files of any size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from utils.data.near_duplicates import group_duplicates, largest_cosine, near_pairs, normalise, vectorise
from utils.project import ROOT

PLANTED = ROOT / "tests" / "planted"
REAL = Path(os.environ.get("SERIES_SHARED", ROOT.parent / "shared")) / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real sample is not beside this checkout")


def planted(kind: str) -> list[tuple[str, str]]:
    """(multiple-choice stem, open-ended rewrite) pairs; written for these tests, about no real patient or exam."""
    lines = (PLANTED / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["source"], row["rewrite"]) for row in map(json.loads, lines)]


def real(name: str, column: str) -> list[str]:
    return [json.loads(line)[column] for line in (REAL / name).read_text(encoding="utf-8").splitlines()]


def found(texts: list[str], threshold: float = 0.5) -> set[tuple[int, int]]:
    pairs = near_pairs(vectorise(texts), threshold=threshold)
    return set(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["vignettes", "facts"])
def test_reworded_questions_are_found_among_others(kind):
    pairs = planted("vignettes") + planted("facts")
    texts = [source for source, _ in pairs] + [rewrite for _, rewrite in pairs]
    near, kept = found(texts), planted(kind)
    start = 0 if kind == "vignettes" else len(pairs) - len(kept)
    hits = sum((i, i + len(pairs)) in near for i in range(start, start + len(kept)))
    assert hits >= 0.9 * len(kept)
    assert len(near) - sum((i, i + len(pairs)) in near for i in range(len(pairs))) <= 0.02 * len(texts)


def test_reworded_questions_are_found_in_a_file_of_ten_rows():
    pairs = planted("vignettes") + planted("facts")
    hits, others = 0, 0
    for i in range(len(pairs)):
        bystanders = [pairs[(i + 5 * k) % len(pairs)][k % 2] for k in range(1, 9)]
        near = found([*pairs[i], *bystanders])
        hits += (0, 1) in near
        others += len(near - {(0, 1)})
    assert hits >= 0.9 * len(pairs) and others <= 0.02 * 10 * len(pairs)


@needs_real
def test_real_training_and_benchmark_questions_are_unrelated():
    rows, items = real("medical_o1_sample.jsonl", "Question"), real("medqa_sample.jsonl", "question")
    vectors = vectorise([*rows, *items])
    pairs = near_pairs(vectors.take(range(len(rows))), vectors.take(range(len(rows), len(rows) + len(items))))
    assert len(set(pairs.left.tolist())) <= 0.02 * len(rows)


@needs_real
def test_the_real_sample_itself_holds_one_question_twice():
    rows = real("medical_o1_sample.jsonl", "Question")
    assert {(rows[i][-60:], rows[j][-60:]) for i, j in found(rows)} == {
        (
            "presents with sudden-onset gross hematuria and a unilateral flank mass?"[-60:],
            "lank mass. What is the most likely diagnosis for this presentation?"[-60:],
        )
    }


@pytest.mark.parametrize(
    "variant",
    [
        str.upper,
        lambda text: text.replace(" ", "  \n"),
        lambda text: text.rstrip("?.") + " ?",
        lambda text: f"Q: {text}",
    ],
    ids=["case", "spacing", "punctuation", "prefix"],
)
def test_a_change_of_case_spacing_or_punctuation_hides_nothing(variant):
    sources = [source for source, _ in planted("facts")[:5]]
    texts = sources + [variant(source) for source in sources]
    assert {(i, i + 5) for i in range(5)} <= found(texts, threshold=0.8)


def test_other_scripts_are_compared_like_latin():
    texts = [
        "一名45岁女性患者出现发热、咳嗽和胸痛三天，胸片显示右下肺实变。最可能的诊断是什么？",
        "45岁女性，发热、咳嗽和胸痛三天，胸片显示右下肺实变，最可能的诊断是什么？",
        "哪种维生素缺乏会导致夜盲症？",
        "ما هو العلاج المناسب لمريض يعاني من ارتفاع ضغط الدم والسكري؟",
        "ما العلاج المناسب لمريض السكري الذي يعاني من ارتفاع ضغط الدم؟",
        "🩺🩺 💊?",
    ]
    assert found(texts) == {(0, 1), (3, 4)}


def test_texts_without_letters_or_of_exam_wording_only_are_no_reason_to_stop():
    assert found(["?", "!", "🩺"]) == set()
    assert found(["Which?", "What is the most likely diagnosis?", "7?"]) == set()
    assert found(["Which of the following is true?", "which of  the following is TRUE ?"]) == {(0, 1)}
    assert found(["alone"]) == set()


@settings(deadline=None, max_examples=50)
@example([" "])
@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=8))
def test_any_text_is_compared_without_a_failure_and_none_is_beyond_one(texts):
    vectors = vectorise(texts)
    assert np.isfinite(vectors.lengths).all() and np.isfinite(vectors.matrix.data).all()
    pairs = near_pairs(vectors, vectors, 0.3)
    assert not len(pairs.cosine) or 0.29 < pairs.cosine.min() <= pairs.cosine.max() <= 1.0
    long = {i for i, text in enumerate(texts) if len(normalise(text)) > 20}
    assert long <= {i for i, j in zip(pairs.left.tolist(), pairs.right.tolist(), strict=True) if i == j}


def test_a_chain_of_near_copies_is_one_group():
    groups = group_duplicates(6, (np.array([0, 1]), np.array([1, 2])), ([4], [5]))
    assert groups.tolist() == [0, 0, 0, 1, 2, 2]
    assert len(set(group_duplicates(3, ([], [])))) == 3


def test_the_largest_cosine_is_that_of_the_nearest_two_and_none_without_texts():
    vectors = vectorise(["Auer rods are seen in", "Kayser-Fleischer rings", "Auer rods are found in", "measles"])
    near, far = (largest_cosine(vectors.take([0, 1]), vectors.take([other])) for other in (2, 3))
    assert near > 0.7 > 0.2 > far and largest_cosine(vectors.take([]), vectors) is None
