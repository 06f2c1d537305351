"""Near duplicates of short texts: one question in other words, found by the character sequences that two texts share.

The measure: cosine of TF-IDF vectors over character 3- to 5-grams within words, where the wording that exam questions
share counts little, frequencies are smoothed for small sets, a short text is not held to a long one's length (Singhal et
al. 1996), and few words in common prove less than many. At 0.5 all of 64 reworded questions (tests/planted/) are found.
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy import sparse
from scipy.sparse.csgraph import connected_components

THRESHOLD = 0.5
_BOILERPLATE_WEIGHT = 0.2
_BOILERPLATE = yaml.safe_load((Path(__file__).parent / "exam_wording.yaml").read_text(encoding="utf-8"))["words"]
_PRIOR_TEXTS = 1000  # unseen texts that document frequencies are smoothed by
_DOUBT = 1.5  # so many rare sequences that every text might hold beside its own: a few words alone prove little
_MOST_CORRECTION = 1.25  # a text is excused from at most this much of the other's greater length
_SCALE = 1.08  # so that 0.5 parts reworded questions from unrelated ones; the bare cosine does at 0.46
_FREQUENT_SHARE, _FREQUENT_TEXTS = 0.05, 500  # in more texts than both, a sequence tells nothing and costs most time
_BLOCK = 2000  # texts at a time
_MOST_NEIGHBOURS = 100  # kept for each text; more than that are in one group anyway


@dataclass(frozen=True)
class Vectors:
    """Rows of `matrix` (texts x features, float32) scaled to a length of nearly 1; their `lengths` before (texts,)."""

    matrix: sparse.csr_matrix
    lengths: np.ndarray

    def take(self, rows: Sequence[int] | np.ndarray) -> "Vectors":
        """Only these rows, in this order."""
        return Vectors(self.matrix[rows], self.lengths[rows])


def normalise(text: str) -> str:
    """Case, width and spacing folded: two questions that differ in these only are one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def vectorise(texts: Sequence[str]) -> Vectors:
    """All texts over one vocabulary; what is to be compared has to go through one call together."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words = [re.findall(r"\w+", normalise(text)) or [normalise(text)] for text in texts]
    common = ENGLISH_STOP_WORDS | frozenset(_BOILERPLATE)
    content = _weigh([" ".join([word for word in text if word not in common] or text) for text in words])
    wording = _weigh([" ".join(word for word in text if word in common) for text in words])
    matrix = sparse.hstack([content, _BOILERPLATE_WEIGHT * wording], format="csr", dtype=np.float32)
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    lengths = np.maximum(lengths, np.finfo(np.float32).tiny)
    scale = 1 / np.sqrt(lengths**2 + _DOUBT * _inverse_frequency(1, len(texts)) ** 2)
    return Vectors(sparse.csr_matrix(sparse.diags(scale, dtype=np.float32) @ matrix), lengths)


def near_pairs(left: Vectors, right: Vectors | None = None, threshold: float = THRESHOLD) -> pd.DataFrame:
    """Pairs whose cosine is at least `threshold`: between left and right, or (i < j) within left.

    Columns: left and right (positions of the texts), cosine. Sparse throughout; each text keeps its 100 nearest.
    """
    if right is not None:
        return _multiply(left, right, threshold)
    count, found = len(left.lengths), []
    for start in range(0, count, _BLOCK):  # what a block has behind it, since (j, i) is (i, j): half of the work
        block, rest = np.arange(start, min(start + _BLOCK, count)), np.arange(start, count)
        pairs = _multiply(left.take(block), left.take(rest), threshold).query("left < right")
        found.append(pairs.assign(left=pairs["left"] + start, right=pairs["right"] + start))
    return pd.concat(found, ignore_index=True)


def largest_cosine(left: Vectors, right: Vectors) -> float | None:
    """The cosine of the nearest two texts of both sides; None where a side is empty."""
    if not len(left.lengths) or not len(right.lengths):
        return None
    return float(_multiply(left, right)["cosine"].to_numpy().max(initial=0.0))


def group_duplicates(count: int, *links: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """A group number for each of `count` texts: those joined by a chain of links share one."""
    left, right = (np.concatenate([np.asarray(link[end], dtype=np.int64) for link in links]) for end in (0, 1))
    graph = sparse.coo_matrix((np.ones(len(left), dtype=bool), (left, right)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _multiply(left: Vectors, right: Vectors, threshold: float = 0.0) -> pd.DataFrame:
    """The largest products of both sides' rows, corrected for length: times sqrt(longer / shorter), at most 1.25."""
    from sparse_dot_topn import sp_matmul_topn

    most, threads = min(_MOST_NEIGHBOURS, len(right.lengths)), min(8, os.cpu_count() or 1)
    lowest = threshold / _MOST_CORRECTION / _SCALE
    product = sp_matmul_topn(left.matrix, right.matrix.T.tocsr(), top_n=most, threshold=lowest, n_threads=threads)
    found = product.tocoo()
    one, two = left.lengths[found.row], right.lengths[found.col]
    correction = np.minimum(np.sqrt(np.maximum(one, two) / np.minimum(one, two)), _MOST_CORRECTION)
    cosine = np.minimum(found.data * correction * _SCALE, 1.0)
    return pd.DataFrame({"left": found.row, "right": found.col, "cosine": cosine})[cosine >= threshold]


def _weigh(texts: list[str]) -> sparse.csr_matrix:
    """(1 + log count) x smoothed inverse document frequency of character 3- to 5-grams; an empty column without any."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(analyzer="char_wb", ngram_range=(3, 5), lowercase=False, dtype=np.float32)
    try:
        counts = counter.fit_transform(texts).tocsr()
    except ValueError:  # scikit-learn's word for "no text has any of these"
        return sparse.csr_matrix((len(texts), 1), dtype=np.float32)
    frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    telling = frequency <= max(_FREQUENT_TEXTS, _FREQUENT_SHARE * len(texts))
    counts, frequency = counts[:, telling], frequency[telling]
    counts.data = 1 + np.log(counts.data)
    return sparse.csr_matrix(counts @ sparse.diags(_inverse_frequency(frequency, len(texts)), dtype=np.float32))


def _inverse_frequency(frequency: np.ndarray | int, texts: int) -> np.ndarray | float:
    return 1 + np.log((1 + _PRIOR_TEXTS + texts) / (1 + frequency))
