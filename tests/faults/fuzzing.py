"""Senseless input: mutations of a committed corpus, and what counts as survived.

A case is survived where the function returns, or raises one of the series' own exceptions with one printable line.
"""

from __future__ import annotations

import copy
import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from utils.errors import UserError

CORPUS = Path(__file__).with_name("corpus")
LIMIT_S = 60  # a case takes some milliseconds, and the machine may be busy
LONGEST_SENTENCE = 1010

# What has broken parsers: numbers without an end, marks, controls, what looks like something else.
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, 0.5, 1e308, -0.0, math.nan, math.inf, "", " ", "a\nb", "\r\n", "\u2028", "\ufeff", "\x1b[31m",
    "None", "nan", "1", "1e999", "-1", "../../etc/passwd", "/dev/zero", "C:\\x", "2024-99-99", "<script>alert(1)</script>", "%s{0}{x}",
    "A", "AA", "é", "x" * 5000, [], {}, [[]], [None], {"": None}, {"a": {"b": [1, {"c": None}]}}, ["a", 1, None], [{}], "医" * 40,
]  # fmt: skip
PIECES = [
    b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\x80", b"\r", b"\n", b"\r\n", b'"', b'""', b"'", b",", b"\t", b"{", b"}", b"[", b"]",
    b"-", b"1e999", b"NaN", b"Infinity", b"null", b"true", b"\\", b"!!python/object:os.system x", b"%", b"\x1b[2J", b": ", b"- ",
    b"\xe2\x80\xa8", b"x" * 4096, b"\xff" * 8,
]  # fmt: skip


def survive(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns, or None where it ends in a sentence; anything else, or no end at all, is a failure."""
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(LIMIT_S)
    try:
        return function(*arguments)
    except UserError as error:
        check_sentence(str(error))
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _hang(*_) -> None:
    raise BaseException(f"no end after {LIMIT_S} s")  # which no `except Exception` in between swallows


def check_sentence(sentence: str) -> None:
    """One printable line of bearable length, whatever was quoted in it."""
    assert sentence.strip() and len(sentence) <= LONGEST_SENTENCE, f"{len(sentence)} characters"
    assert sentence.isprintable(), f"not one printable line: {sentence[:300]!r}"


def cases(count: int, **strategies: SearchStrategy) -> Callable:
    """Runs a test `count` times, with the same inputs each time."""
    same = settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    return lambda test: same(given(**strategies)(test))


def corpus(area: str, pattern: str = "*") -> list[Path]:
    """The committed files of one area: some are sound, most once ended in a traceback."""
    found = sorted(path for path in (CORPUS / area).glob(pattern) if path.is_file())
    assert found, f"no corpus {area}/{pattern}"
    return found


def mutated_bytes(*seeds: bytes) -> SearchStrategy[bytes]:
    """A seed with one to five edits: cut, flipped, doubled, replaced, or joined with another seed."""
    return st.integers(0, 2**64 - 1).map(lambda number: _edit(random.Random(number), seeds))


def _edit(rng: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        place = rng.randrange(len(data) + 1)
        width = min(rng.choice((1, 1, 2, 4, 16, 64, 256)), max(1, len(data) - place))
        match rng.randrange(7):
            case 0:
                del data[place:]
            case 1:
                del data[place : place + width]
            case 2 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 3:
                data[place : place + width * rng.randrange(2)] = rng.choice(PIECES)
            case 4:
                data[place:place] = data[place : place + width] * rng.choice((1, 2, 50))
            case 5:
                other = rng.choice(seeds)
                data[place:] = other[rng.randrange(len(other) + 1) :]
            case _:
                data[place : place + width] = rng.randbytes(width)
    return bytes(data)


def mutated_values(*seeds: Any) -> SearchStrategy[Any]:
    """A JSON value with one to three edits of its structure: a node replaced, dropped, renamed, or wrapped."""
    return st.integers(0, 2**64 - 1).map(
        lambda number: _restructure(random.Random(number), copy.deepcopy(seeds[number % len(seeds)]))
    )


def _restructure(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places, new = list(_places(value)), copy.deepcopy(rng.choice(NASTY))  # the next edit may go into it
        if not places or rng.random() < 0.01:
            value = new
            continue
        parent, key = rng.choice(places)
        match rng.randrange(5):
            case 0 | 1:
                parent[key] = new
            case 2:
                del parent[key]
            case 3 if isinstance(parent, dict):
                parent[rng.choice(("", "x", "../x", f"{key} ", "profile", "sha256", "0"))] = parent.pop(key)
            case _:
                parent[key] = rng.choice(([parent[key]], {"x": parent[key]}))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every node below `value`."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in children:
            yield node, key
            waiting.append(child)


def to_json(value: Any) -> bytes:
    """As a careless program writes it, with NaN in it."""
    return json.dumps(value).encode()


VALUES = st.recursive(
    st.sampled_from([value for value in NASTY if not isinstance(value, (list, dict))]) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
