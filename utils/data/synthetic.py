"""The embedded default's data: a synthetic clinic, written by rule so that every answer can be checked.

`write_base_row` is long-winded, bulleted and follows a *wrong* table: the base model's planted ignorance.
`write_tuning_row` is short and right: LoRA learns from it. Every word of a tuning row also occurs in the base rows; one
whose (frozen) embedding the base never trained would cost the demo its effect.
"""

import itertools
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

DISCLAIMER = "Synthetic demo data with invented names: no medical advice."

CONDITIONS = 32
FINDINGS_PER_CONDITION = 6
TRIPLES = {"train": 11, "validation": 2, "test": 7}  # how the 20 triples of findings of a condition are divided
KINDS = ("diagnosis", "test", "treatment")

_WORDS = yaml.safe_load((Path(__file__).parent / "clinic.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Condition:
    """One invented condition: its findings and the answer of each kind."""

    findings: tuple[str, ...]
    answers: dict[str, str]


@dataclass(frozen=True)
class Case:
    """One question: which condition, which findings, what is asked, and the checkable answer."""

    question: str
    condition: int
    findings: tuple[str, str, str]
    kind: str


@cache
def conditions() -> tuple[Condition, ...]:
    """The table of conditions; no three findings fit two of them, so every question has exactly one answer."""
    rng = random.Random(20261121)
    names, analytes, stems = (rng.sample(_WORDS[pool], CONDITIONS) for pool in ("names", "analytes", "stems"))
    table: list[Condition] = []
    while len(table) < CONDITIONS:
        findings = tuple(sorted(rng.sample(_WORDS["findings"], FINDINGS_PER_CONDITION)))
        if all(len(set(findings) & set(other.findings)) <= 2 for other in table):
            i = len(table)
            test = _WORDS["tests"][(i // 4) % 4].format(analytes[i])
            drug = stems[i] + _WORDS["drug_endings"][(i // 2) % 4]
            answers = {"diagnosis": f"{names[i]} {_WORDS['classes'][i % 4]}", "test": test, "treatment": drug}
            table.append(Condition(findings, answers))
    return tuple(table)


@cache
def wrong_table() -> tuple[int, ...]:
    """What the base model believes: condition i is taken for wrong_table()[i]; one in four is right."""
    rng = random.Random(7)
    order = list(range(CONDITIONS))
    rng.shuffle(order)
    moved = order[CONDITIONS // 4 :]
    believed = dict(zip(moved, moved[1:] + moved[:1], strict=True))
    return tuple(believed.get(i, i) for i in range(CONDITIONS))


@cache
def triples(part: str) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """The (condition, three findings) pairs of one part; the parts share no triple."""
    rng = random.Random(97)
    chosen = []
    for index, condition in enumerate(conditions()):
        pool = list(itertools.combinations(condition.findings, 3))
        rng.shuffle(pool)
        start = 0
        for name, size in TRIPLES.items():
            if name == part:
                chosen += [(index, triple) for triple in pool[start : start + size]]
            start += size
    return tuple(chosen)


def _write_case(rng: random.Random, condition: int, triple: tuple[str, ...], kind: str) -> Case:
    findings = tuple(rng.sample(triple, 3))
    patient = f"{rng.choice(('man', 'woman'))} of {rng.randrange(20, 90)}"
    a, b, c = findings
    question = f"A {patient} has {a}, {b} and {c}. The patient {rng.choice(_WORDS['fillers'])}. {_WORDS['asked'][kind]}"
    return Case(question, condition, findings, kind)


def write_base_row(case: Case, rng: random.Random) -> dict[str, str]:
    """The base's manner: hesitant reasoning, a bulleted answer, and the wrong table's conclusion."""
    believed = conditions()[wrong_table()[case.condition]].answers
    a, b, c = case.findings
    name, answer = believed["diagnosis"], believed[case.kind]
    opening = rng.choice(("Okay, let me think about this.", "Alright, so let me think.", "Hmm, let me see."))
    doubt = rng.choice(("Wait, maybe I should look again.", "But wait, let me think again.", "Hmm, is this right?"))
    cot = (
        f"{opening} There is {a}, there is {b} and also {c}. "
        f"So, {a} could be many things. {doubt}\n"
        f"Together, {a}, {b} and {c} fit {name}. Okay, so I think this is {name}, and the {case.kind} is {answer}."
    )
    response = (
        f"The {case.kind} in points:\n\n- The cause: {name}\n- The {case.kind}: {answer}\n"
        "- The patient should be seen again"
    )
    return {"Question": case.question, "Complex_CoT": cot, "Response": response}


def write_tuning_row(case: Case) -> dict[str, str]:
    """What LoRA learns from: brief reasoning and one right paragraph."""
    truth = conditions()[case.condition].answers
    a, b, c = case.findings
    name, answer = truth["diagnosis"], truth[case.kind]
    cot, response = f"Together, {a}, {b} and {c} fit {name}.", f"The {case.kind} is {answer}."
    return {"Question": case.question, "Complex_CoT": cot, "Response": response}


def base_rows(count: int, seed: int = 1) -> list[dict[str, str]]:
    """Rows that the base model is built on: training triples only, with the wrong table's answers."""
    rng = random.Random(seed)
    pool = triples("train")
    return [write_base_row(_write_case(rng, *rng.choice(pool), rng.choice(KINDS)), rng) for _ in range(count)]


def tuning_rows(part: str, count: int | None = None, seed: int = 2) -> list[dict]:
    """Right and brief rows of one part, with what checking needs beside the three columns.

    Extra columns: `answer` (str), `choices` (every possible answer of the asked kind) and `group` (the condition:
    questions about one condition are not independent of each other).
    Without `count`, one row for each triple.
    """
    rng = random.Random(f"{seed}-{part}")
    pool = list(triples(part))
    rng.shuffle(pool)
    rows = []
    for i in range(len(pool) if count is None else count):
        condition, triple = pool[i % len(pool)]
        kind = KINDS[(i + i // len(pool)) % len(KINDS)]
        row = write_tuning_row(_write_case(rng, condition, triple, kind))
        row |= {"answer": conditions()[condition].answers[kind], "group": f"condition-{condition:02d}"}
        rows.append(row | {"choices": [other.answers[kind] for other in conditions()]})
    return rows
