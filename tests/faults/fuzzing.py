"""What the fuzz tests share: mutations of a committed corpus, a limit of time for each case, and what counts as survived.

A case is survived where the function returns, or raises one of the series' own exceptions with one printable line. Any
other exception, a case without an end, or a sentence of several lines fails the test with its input.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from utils.errors import UserError

CORPUS = Path(__file__).with_name("corpus")
LONG = "FAULTS_LONG"  # set: every fault in full, senseless input ten times over; unset: what fits into CI
LIMIT_S = 10.0  # of processor time: a case takes some milliseconds
SILENCE_S = 120.0  # of any time: what waits uses no processor, and the machine may be busy
LONGEST_SENTENCE = 1010
MORE = 10  # times as many cases where the suite runs in full, and other ones each time

# What has broken parsers: numbers without an end, halves of characters, marks, controls, what looks like something else.
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, -(2**63) - 1, 10**400, 0.5, 1e308, -0.0, math.nan, math.inf, -math.inf,
    "", " ", "\x00", "a\nb", "\r\n", "\u2028", "\ufeff", "\ud800", "\x1b[31m", "None", "nan", "null", "1", "1e999", "-1",
    "../../etc/passwd", "/dev/zero", "C:\\x", "2024-99-99", "<script>alert(1)</script>", "%s%n{0}{x}", "A", "AA", "é",
    "x" * 5000, [], {}, [[]], [None], {"": None}, {"a": {"b": [1, {"c": None}]}}, ["a", 1, None], [{}], "医" * 40,
]  # fmt: skip
_PIECES = [
    b"", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xed\xa0\x80", b"\xc3", b"\x80", b"\r", b"\n", b"\r\n", b'"', b'""',
    b"'", b",", b"\t", b"{", b"}", b"[", b"]", b"[" * 1200, b'{"a":' * 1200, b"9" * 5000, b"-", b"1e999", b"NaN", b"Infinity",
    b"null", b"true", b"\\u0000", b"\\ud800", b"\\", b"&a [*a,*a]", b"!!python/object:os.system x", b"%", b"\x1b[2J", b": ", b"- ",
    b"<<: ", b"\xe2\x80\xa8", b"x" * 4096, b"\x00" * 64, b"\xff" * 8,
]  # fmt: skip


class Hang(BaseException):
    """A case took longer than LIMIT_S; no `except Exception` in between may swallow that."""


@contextmanager
def within(seconds: float = LIMIT_S) -> Iterator[None]:
    """Raise Hang in the block where it takes so many seconds of processor time, or SILENCE_S of any."""

    def stop(number: int, _) -> None:
        raise Hang(f"no end after {seconds if number == signal.SIGPROF else SILENCE_S:g} s")

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, SILENCE_S)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def survive(function: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, str | None]:
    """(result, None), or (None, the sentence); anything else is a failure."""
    with within():
        try:
            return function(*arguments, **named), None
        except UserError as error:
            sentence = str(error)
    check_sentence(sentence)
    return None, sentence


def check_sentence(sentence: str) -> None:
    """One printable line of bearable length, whatever was quoted in it."""
    assert sentence.strip(), "an empty sentence"
    assert sentence.isprintable(), f"not one printable line: {sentence[:300]!r}"
    assert len(sentence) <= LONGEST_SENTENCE, f"{len(sentence)} characters"


class Fuzz:
    """Counts the cases that were really executed; `run` fails where they are fewer than were promised."""

    def __init__(self, record: Callable[..., None]):
        self.record = record

    def run(self, kind: str, cases: int, strategy: SearchStrategy, check: Callable[[Any], None]) -> None:
        """`check` on `cases` inputs (MORE times as many in the long form); the same ones each time in the short form."""
        long = bool(os.environ.get(LONG))
        promised, executed = cases * (MORE if long else 1), 0

        @settings(
            max_examples=promised,
            derandomize=not long,
            database=None,
            deadline=None,  # `within` ends a case that hangs; hypothesis would only tell afterwards
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink) if long else (Phase.generate,),
            print_blob=True,
        )
        @given(strategy)
        def case(value: Any) -> None:
            nonlocal executed
            executed += 1
            check(value)

        survived = 0
        try:
            case()
            survived = executed
        finally:
            self.record(kind, tried=max(executed, 1), survived=survived)
        assert executed >= promised, f"{executed} cases of {kind}, {promised} were promised"


def corpus(area: str, pattern: str = "*") -> list[Path]:
    """The committed files of one area; every test of that area reads each as it is, and mutates it."""
    found = sorted(path for path in (CORPUS / area).glob(pattern) if path.is_file())
    assert found, f"no corpus {area}/{pattern}"
    return found


def mutated_bytes(seeds: list[bytes]) -> SearchStrategy[bytes]:
    """A seed with one to five edits: cut, flipped, doubled, replaced, or joined with another seed."""
    return st.integers(0, 2**64 - 1).map(lambda number: _edit(random.Random(number), seeds))


def _edit(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        place = rng.randrange(len(data) + 1)
        width = min(rng.choice((1, 1, 2, 4, 16, 64, 256)), max(1, len(data) - place))
        match rng.randrange(8):
            case 0:
                del data[place:]
            case 1:
                del data[place : place + width]
            case 2 if data:
                data[place % len(data)] ^= 1 << rng.randrange(8)
            case 3:
                data[place:place] = rng.choice(_PIECES)
            case 4:
                data[place : place + width] = rng.choice(_PIECES)
            case 5:
                data[place:place] = data[place : place + width] * rng.choice((1, 2, 50))
            case 6:
                other = rng.choice(seeds)
                data[place:] = other[rng.randrange(len(other) + 1) :]
            case _:
                data[place : place + width] = rng.randbytes(width)
    return bytes(data)


def mutated_values(seeds: list[Any]) -> SearchStrategy[Any]:
    """A JSON value with one to three edits of its structure: a node replaced, dropped, renamed, wrapped, or moved."""
    texts = [json.dumps(seed) for seed in seeds]
    return st.integers(0, 2**64 - 1).map(
        lambda number: _restructure(random.Random(number), json.loads(_pick(number, texts)))
    )


def _pick(number: int, texts: list[str]) -> str:
    return texts[number % len(texts)]


def _restructure(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        parent, key = rng.choice(places) if places else (None, None)
        new = copy.deepcopy(rng.choice(NASTY))  # the next edit may go into it
        if parent is None or rng.random() < 0.01:
            value = new
            continue
        match rng.randrange(6):
            case 0 | 1:
                parent[key] = new
            case 2:
                del parent[key]
            case 3 if isinstance(parent, dict):
                parent[rng.choice(("", "x", "../x", "\ud800", f"{key} ", "profile", "sha256", "0"))] = parent.pop(key)
            case 4:
                parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
            case _:
                other, name = rng.choice(places)
                if _holds(other, name):
                    parent[key] = json.loads(json.dumps(other[name]))
    return value


def _holds(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else isinstance(key, int) and key < len(parent)


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
    """As a careless program writes it: NaN and halves of characters are in it."""
    return json.dumps(value).encode()


VALUES = st.recursive(
    st.one_of(
        st.sampled_from([value for value in NASTY if not isinstance(value, (list, dict))]),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
