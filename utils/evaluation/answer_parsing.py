"""What a completion says: its reasoning, its answer, and whether the answer is explicit.

Only what stands after the closed think block counts. A letter or a name inside unfinished reasoning is not an answer:
crediting those lifts reported accuracy by 11 to 25 points on real outputs.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"
_MARKS = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
# Explicit ways of giving a letter, strongest first; {x} is replaced by the letter's own pattern. Every quantifier over
# what may repeat is bounded: answers of 100,000 characters must not backtrack.
_HEDGES = r"(?:(?:most|very|probably|likely|therefore|thus|clearly|indeed|definitely|option|choice|letter|the|best)\s+)"
_VERB = r"(?:\b(?:is|(?:would|should|must|will|has to|ought to) be|(?:seems|appears)(?: to be)?)\b|[:=]|\s[-–—](?=\s)|是|为|為|选|選)"
_NOT = r"(?<!\bnot )(?<!n't )(?<!never )(?<!不)"
_RIGHT = r"(?i:(?:most|single|only|likely)[ ]+){{0,2}}(?i:correct|right|best|appropriate|answer)"
_LETTER_PATTERNS = (
    r"\\boxed\{{\s*(?:\\\w{{1,8}}\{{)?\s*\(?{x}",
    r"(?i:<answer>)\s*\(?{x}",
    r"(?i:(?<!wrong )(?<!incorrect )(?:\banswer|答案|选项|選項|الجواب|الإجابة)[\*_]{{0,8}}"
    r"(?:[ ]+(?!not\b|choices?\b[ ]*[A-Z]\b)\w{{1,20}}){{0,6}}?"
    r"[\*_ ]{{0,8}}{verb}[\s\*_]{{0,8}}:?[\s\*_]{{0,8}}{hedges}{{0,3}}){mark}{x}",
    r"(?i:\b(?:best|correct|right|final|my|appropriate|likely)[\*_ ]{{1,8}}(?:option|choice|one)[\*_]{{0,8}}"
    r"(?:[ ]+(?!not\b)\w{{1,20}}){{0,4}}?[\*_ ]{{0,8}}{verb}[\s\*_]{{0,8}}:?[\s\*_]{{0,8}}{hedges}{{0,3}}){mark}{x}",
    r"(?i:\b(?:correct|right|best|final)[ ](?:answer|option|choice)),?[ ][\(\*]{{0,3}}{x}[\)\*]{{0,3}},?[ ](?i:is|would)\b(?![ ]not)",
    r"(?m)(?:^|[.!?:;,][ ]{{1,2}}|\b(?i:option|choice|answer|so|therefore|thus|hence)[ ])[\(\*]{{0,3}}{x}[\)\*]{{0,3}}"
    r"(?:[ ]\([^()\n]{{1,80}}\))?[ ]{{1,8}}(?i:is|would be)[ ]+(?i:(?:the|therefore|thus|clearly)[ ]+){{0,2}}{right}",
    r"(?i:{no}\b(?:go|going|goes)[ ]+with|{no}\b(?:choose|select|pick)|(?<!不)[选選][择擇项項]?)[ ]*"
    r"(?i:(?:option|choice|answer)[ ]+)?{mark}{x}",
    r"{x}\s?[选選][项項](?:是)?正[确確]",
    r"(?m)^[ \t\*_(\[]*{x}(?:[\*_)\].:]+(?:\s|$)|[ \t]*$)",
    r"(?m)^\W{{0,4}}(?i:answer|option|choice)(?:[ ]|:[ ]?){x}\W*$",
    r"\((?i:option|choice|answer)[ ]{x}\)",
    r"(?i:\b(?:correct|best|right|likely|appropriate)(?:[ ]\w{{1,20}}){{1,4}}[ ]is[ ])[\(\*]{{0,3}}{x}(?:\)|[.:][ ]+(?=[A-Z][a-z]))",
    r"(?m)\*\*[ ]?\(?{x}[.):][ ][^\*\n]{{1,300}}\*\*(?=[.,;:!]?\s*$|[.,;][ ])",
)
_MARK = r"[\s\*_\"'“「`$(\[]{0,8}(?:\\\(\s?|\\\w{1,8}\{)?"
# What may follow a stated letter: not more of a word (C-reactive), not a species (E. coli) or a possessive (A's), and no word in
# small letters that makes it an article or part of a name (A patient, B natriuretic peptide), unless that word goes on with the sentence.
_SPECIES = (
    r"\.[ ](?:coli|difficile|diff|albicans|trachomatis|burgdorferi|cereus|anthracis|pertussis|botulinum|tetani|"
    r"perfringens|jejuni|fumigatus|faecalis|histolytica|henselae|diphtheriae|neoformans|pneumoniae|aureus)\b"
)
_ON = "because|since|as|due|for|based|which|with|given|here|is|would|and|or|but|in|not|rather|though|while"
_AFTER = rf"(?![A-Za-z0-9_'’]|[-‐‑][A-Za-z0-9])(?!{_SPECIES})(?![ ](?!(?:{_ON})\b)[a-z0-9])"
_FURTHER = (
    r"[\s\*_)\]}\"”」`$.]{0,6}(?:,?\s{0,2}\b(?:or|and)\b\s{1,2}(?:(?:maybe|possibly|perhaps|also|even)\s)?|\s?[/&]\s?|,\s)"
    r"(?:(?i:option|choice)\s)?[\*_(]{0,3}[LETTERS]\b(?!\s{1,2}(?:is|are|was|were|would|can|could|does|do|has|have|isn))"
)


_LONG_RUN = re.compile(r"\s{9,}|[*_(\[]{9,}")


def _shorten(run: str) -> str:
    """A long run of spaces or marks as the shortest that reads the same."""
    return ("\n\n" if "\n" in run else " ") if run.isspace() else run[:4]


@dataclass(frozen=True)
class Completion:
    """A completion taken apart. `answer` is empty unless the think block was closed."""

    reasoning: str
    answer: str
    closed: bool
    well_formed: bool


def parse_completion(text: str) -> Completion:
    """Split a completion at `</think>`.

    The opening mark may be missing, since the prompt ends in it. Well-formed means: the block is closed exactly once,
    opened at most once and at the start, and followed by a non-empty answer.
    """
    for mark in _MARKS:
        text = text.replace(mark, "")
    head, mark, tail = text.partition(CLOSE)
    closed = bool(mark)
    reasoning = head.strip().removeprefix(OPEN).strip()
    answer = tail.strip() if closed else ""
    well_formed = closed and bool(answer) and OPEN not in reasoning and OPEN not in answer and CLOSE not in answer
    return Completion(reasoning, answer, closed, well_formed)


def explicit_letter(answer: str, letters: Iterable[str]) -> str | None:
    """The one option letter that an answer states, or None where it states none or several different ones."""
    allowed = "".join(re.escape(letter) for letter in letters)
    answer = _LONG_RUN.sub(lambda run: _shorten(run[0]), unicodedata.normalize("NFKC", answer))
    right = _RIGHT.replace("{{", "{").replace("}}", "}")
    parts = {
        "x": f"(?P<x>[{allowed}]{_AFTER})",
        "verb": _VERB,
        "hedges": _HEDGES,
        "mark": _MARK,
        "no": _NOT,
        "right": right,
    }
    further = re.compile(_FURTHER.replace("LETTERS", allowed))
    for pattern in _LETTER_PATTERNS:
        matches = list(re.finditer(pattern.format(**parts), answer))
        if matches:
            found = {match["x"] for match in matches}
            several = any(further.match(answer, match.end("x")) for match in matches)
            return found.pop() if len(found) == 1 and not several else None
    return None


def any_letter(text: str, letters: Iterable[str]) -> str | None:
    """The last option letter that stands by itself anywhere, unfinished reasoning included.

    What lenient scorers amount to. It is here to show how much they flatter, and decides nothing.
    """
    found = re.findall(rf"\b([{''.join(letters)}])\b", text)
    return found[-1] if found else None


def named_choices(answer: str, choices: Iterable[str]) -> list[str]:
    """Which of `choices` an answer names as whole words, case ignored; a name inside a longer found name is none."""
    text = answer.casefold()
    found = {c for c in choices if re.search(rf"(?<!\w){re.escape(c.casefold())}(?!\w)", text)}
    return sorted(c for c in found if not any(c != other and c.casefold() in other.casefold() for other in found))


def count_paragraphs(answer: str) -> int:
    """Blocks of text separated by blank lines."""
    return len([block for block in re.split(r"\n\s*\n", answer) if block.strip()])


def has_bullets(answer: str) -> bool:
    """Whether any line starts as a list item."""
    return re.search(r"(?m)^[ \t]*(?:[-*•]|\d+[.)])[ \t]+\S", answer) is not None
