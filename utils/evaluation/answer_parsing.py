r"""What a completion says: its reasoning, its answer, and whether the answer is explicit.

Only what stands after the closed think block counts. A letter or a name inside unfinished reasoning is not an answer:
crediting those lifts reported accuracy by 11 to 25 points on real outputs.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
_MARKS = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
_LONG_RUN = re.compile(r"\s{9,}|[*_(\[]{9,}")
# Parts of the patterns below, by the word that stands for them there. All are verbose: a space in a pattern is nothing,
# [ ] is a space. Every quantifier over what may repeat is bounded: answers of 100,000 characters must not backtrack.
_PARTS = {
    # The letter, and what may not follow it: more of a word (C-reactive), a species (E. coli), a possessive (A's), and a
    # word in small letters that makes it an article or part of a name (A patient), unless it goes on with the sentence.
    "LETTER": r"""(?P<letter> [OPTIONS] (?! [A-Za-z0-9_'’] | [-‐‑][A-Za-z0-9] ) (?! SPECIES ) (?! [ ](?! (?: GOES_ON )\b ) [a-z0-9] ) )""",
    "SPECIES": r"""\.[ ](?: coli|difficile|diff|albicans|trachomatis|burgdorferi|cereus|anthracis|pertussis|botulinum|tetani|
        perfringens|jejuni|fumigatus|faecalis|histolytica|henselae|diphtheriae|neoformans|pneumoniae|aureus )\b""",
    "GOES_ON": "because|since|as|due|for|based|which|with|given|here|is|would|and|or|but|in|not|rather|though|while",
    "COPULA": r"""(?: VERB [\s*_]{0,8} :? [\s*_]{0,8} HEDGE{0,3} )""",
    "VERB": r"""(?: \b(?: is | (?:would|should|must|will|has[ ]to|ought[ ]to)[ ]be | (?:seems|appears)(?:[ ]to[ ]be)? )\b
        | [:=] | \s[-–—](?=\s) | 是|为|為|选|選 )""",
    "HEDGE": r"""(?: (?:most|very|probably|likely|therefore|thus|clearly|indeed|definitely|option|choice|letter|the|best) \s+ )""",
    "MARK": r"""[\s*_"'“「`$(\[]{0,8} (?: \\\(\s? | \\\w{1,8}\{ )?""",
    "RIGHT": r"""(?: (?:most|single|only|likely)[ ]+ ){0,2} (?:correct|right|best|appropriate|answer)""",
    "NOT_NOT": r"""(?<! \bnot[ ] ) (?<! n't[ ] ) (?<! never[ ] ) (?<! 不 )""",
}
# Ways of giving a letter, strongest first: (name, an example, pattern).
_WAYS = (
    ("boxed", r"\boxed{\text{B}}", r"\\boxed\{ \s* (?: \\\w{1,8}\{ )? \s* \(? LETTER"),
    ("tagged", "<answer>B</answer>", r"(?i: <answer> ) \s* \(? LETTER"),
    ("answer is", "The final answer to this question is **B**",
     r"""(?i: (?<! wrong[ ] ) (?<! incorrect[ ] ) (?: \banswer|答案|选项|選項|الجواب|الإجابة ) [*_]{0,8}
         (?: [ ]+ (?! not\b | choices?\b[ ]*[A-Z]\b ) \w{1,20} ){0,6}? [*_ ]{0,8} COPULA ) MARK LETTER"""),
    ("best option is", "The best option here would be B",
     r"""(?i: \b(?:best|correct|right|final|my|appropriate|likely) [*_ ]{1,8} (?:option|choice|one) [*_]{0,8}
         (?: [ ]+ (?! not\b ) \w{1,20} ){0,4}? [*_ ]{0,8} COPULA ) MARK LETTER"""),
    ("correct answer, B, is", "The correct answer (B) is metformin",
     r"""(?i: \b(?:correct|right|best|final)[ ](?:answer|option|choice) ) ,? [ ] [(*]{0,3} LETTER [)*]{0,3} ,?
         [ ] (?i: is|would )\b (?! [ ]not )"""),
    ("B is the right one", "Therefore, option B (metformin) is correct",
     r"""(?: ^ | [.!?:;,][ ]{1,2} | \b(?i: option|choice|answer|so|therefore|thus|hence )[ ] ) [(*]{0,3} LETTER [)*]{0,3}
         (?: [ ]\([^()\n]{1,80}\) )? [ ]{1,8} (?i: is|would[ ]be ) [ ]+ (?i: (?:the|therefore|thus|clearly)[ ]+ ){0,2} (?i: RIGHT )"""),
    ("choose B", "I'd go with B",
     r"""(?i: NOT_NOT \b(?:go|going|goes)[ ]+with | NOT_NOT \b(?:choose|select|pick) | (?<! 不 ) [选選][择擇項项]? ) [ ]*
         (?i: (?:option|choice|answer)[ ]+ )? MARK LETTER"""),
    ("B is right, in Chinese", "B选项正确", r"LETTER \s? [选選][项項] (?:是)? 正[确確]"),
    ("alone or in front", "**B. Metformin**", r"^ [ \t*_(\[]* LETTER (?: [*_)\].:]+ (?: \s | $ ) | [ \t]*$ )"),
    ("label and letter", "Answer B", r"^ \W{0,4} (?i: answer|option|choice ) (?: [ ] | :[ ]? ) LETTER \W*$"),
    ("in brackets", "Give metformin (option B).", r"\( (?i: option|choice|answer )[ ] LETTER \)"),
    ("next step is", "The most appropriate next step is B) MRI",
     r"""(?i: \b(?:correct|best|right|likely|appropriate|accurate) (?: [ ]\w{1,20} ){1,4} [ ]is[ ] ) [(*]{0,3} LETTER
         (?: \) | [.:][ ]+(?= [A-Z][a-z] ) )"""),
    ("bold at a sentence's end", "It must be **B. Aortic stenosis**.",
     r"\*\* [ ]? \(? LETTER [.):][ ] [^*\n]{1,300} \*\* (?= [.,;:!]?\s*$ | [.,;][ ] )"),
)  # fmt: skip
# A second letter beside the first: "A or maybe B", "A/C", "A and C", but not "A and C is wrong".
_SECOND = r"""[\s*_)\]}"”」`$.]{0,6}
    (?: ,?\s{0,2} \b(?:or|and)\b \s{1,2} (?: (?:maybe|possibly|perhaps|also|even)\s )? | \s?[/&]\s? | ,\s )
    (?: (?i: option|choice )\s )? [*_(]{0,3} [OPTIONS]\b (?! \s{1,2}(?:is|are|was|were|would|can|could|does|do|has|have|isn) )"""
_PLAIN = str.maketrans("’‘‐‑-", "''   ")  # writers differ in apostrophes and hyphens
_SENTENCES = re.compile(r"(?<=[.!?;。！？])(?<!\b[A-Z]\.)\s+|\n+")  # not after the E of E. coli
# What only gives a reason: "It is gout, as the joint is not infected" takes back nothing and names no second option.
_REASON = re.compile(r",\s{1,3}(?:as|because|since)\b.*", re.IGNORECASE)
# What stands before the option that a sentence gives as the answer: "The most likely cause of all this is", "Therefore".
_GIVEN_AS = re.compile(
    r"""\b(?: answer | best | correct | diagnosis | likely | most | right )\b .{0,200}? (?: \b(?: is | was | are | be )\b | [:=] )
        | ^\W{0,8} (?: therefore | thus | hence | so | in[ ]conclusion | in[ ]summary )\b""",
    re.VERBOSE | re.IGNORECASE,
)
# What takes back whatever its sentence names: "It is not gout", "Gout is unlikely", "Colchicine rather than aspirin".
_NEGATION = re.compile(
    r"""n['’]t\b | \b(?: not | no | nor | never | neither | without | unlikely | unlike | less | incorrect | wrong | false | rather
        | instead | except | exclud\w* | rul(?:e[sd]?|ing)[ ]out )\b | [不非没無无] | 排除""",
    re.VERBOSE | re.IGNORECASE,
)


class Completion(NamedTuple):
    """A completion taken apart. `answer` is empty unless the think block was closed."""

    reasoning: str
    answer: str
    closed: bool
    well_formed: bool


def parse_completion(text: str) -> Completion:
    """Split a completion at `</think>`; it is well-formed with one such mark and an answer after it."""
    for mark in _MARKS:
        text = text.replace(mark, "")
    head, mark, tail = text.partition(CLOSE)
    reasoning, answer = head.strip().removeprefix(OPEN).strip(), tail.strip()
    well_formed = bool(answer) and OPEN not in reasoning and OPEN not in answer and CLOSE not in answer
    return Completion(reasoning, answer, bool(mark), well_formed)


def explicit_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that an answer states, by its letter or else by its full text; None for none or several.

    A text counts as whole words where its sentence negates nothing: first what sentences give as the answer, else what
    the first one names. What is only discussed further on is no answer. Where an option negates too, only letters count.
    """
    if letters := _stated_letters(answer, options):
        return letters[0] if len(letters) == 1 else None
    texts = {letter: text.translate(_PLAIN).strip(' ."\n') for letter, text in options.items()}
    if any(map(_NEGATION.search, texts.values())):
        return None
    sentences = [_REASON.sub("", sentence) for sentence in _SENTENCES.split(answer.translate(_PLAIN).strip())]
    affirmed = [sentence for sentence in sentences if not _NEGATION.search(sentence)]
    given = [sentence[match.end() :] for sentence in affirmed if (match := _GIVEN_AS.search(sentence))]
    for place in (given, affirmed[:1]):
        named = named_choices("\n".join(place), filter(None, texts.values()))
        if found := [letter for letter, text in texts.items() if text in named]:
            return found[0] if len(found) == 1 else None
    return None


def _stated_letters(answer: str, letters: Iterable[str]) -> list[str]:
    """The letters that the strongest way found in an answer states; a letter beside a second one counts as several."""
    ways, second = _compile("".join(letters))
    answer = _LONG_RUN.sub(_shorten, unicodedata.normalize("NFKC", answer))
    for way in ways.values():
        if matches := list(way.finditer(answer)):
            seconds = [beside[0] for match in matches if (beside := second.match(answer, match.end("letter")))]
            return sorted({match["letter"] for match in matches}) + seconds
    return []


@lru_cache(maxsize=64)
def _compile(letters: str) -> tuple[dict[str, re.Pattern], re.Pattern]:
    """({name: pattern}, the pattern of a second letter) for these option letters."""

    def fill(pattern: str) -> re.Pattern:
        for name, part in _PARTS.items():  # in their order: the first ones hold words of later ones
            pattern = re.sub(rf"\b{name}\b", lambda _, part=part: part, pattern)
        return re.compile(pattern.replace("OPTIONS", re.escape(letters)), re.VERBOSE | re.MULTILINE)

    return {name: fill(pattern) for name, _, pattern in _WAYS}, fill(_SECOND)


def _shorten(run: re.Match) -> str:
    """A long run of spaces or marks as the shortest that reads the same."""
    return ("\n\n" if "\n" in run[0] else " ") if run[0].isspace() else run[0][:4]


def any_letter(text: str, letters: Iterable[str]) -> str | None:
    """The last option letter that stands by itself anywhere: how lenient scorers flatter; it decides nothing."""
    found = re.findall(rf"\b([{''.join(letters)}])\b", text)
    return found[-1] if found else None


def named_choices(answer: str, choices: Iterable[str]) -> list[str]:
    """Which of `choices` an answer names as whole words, case ignored; a name inside a longer found name is none."""
    text = answer.casefold()
    found = {c for c in choices if re.search(rf"(?<!\w){re.escape(c.casefold())}(?!\w)", text)}
    return sorted(c for c in found if not any(c != other and c.casefold() in other.casefold() for other in found))


def count_paragraphs(answer: str) -> int:
    """Blocks of text separated by blank lines."""
    return sum(bool(block.strip()) for block in re.split(r"\n\s*\n", answer))


def has_bullets(answer: str) -> bool:
    """Whether any line starts as a list item."""
    return re.search(r"(?m)^[ \t]*(?:[-*•]|\d+[.)])[ \t]+\S", answer) is not None
