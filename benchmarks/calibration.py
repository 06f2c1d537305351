"""How often does the deciding rule say "better" or "worse", where the truth is known because it was drawn?

    python -m benchmarks.calibration COMPLETIONS.jsonl RUN_DIR MEDQA.jsonl --out benchmarks/results/calibration.json

Every experiment draws n questions and both models' answers to them, and passes them to the code that judges a real run.
What an answer looks like (finished or cut off, with an option stated or none) is that of a real one, drawn with
replacement: of a reasoning model's COMPLETIONS for both models alike, or of SmolLM2's answers to MEDQA in RUN_DIR, for each
model its own. Whether its letter is right is drawn by a latent model: a question's difficulty from Beta(0.56, 0.46), so
that a model is right on 55 % and two equal models differ on a quarter of the questions, and each model's letter by that
chance. The letter that a model states and the one that it is asked for are the same, except where a case says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import typer

from benchmarks.evidence import add_to_file
from benchmarks.extraction import read_lines
from utils.evaluation.answer_parsing import explicit_letter, parse_completion
from utils.evaluation.compare import decide
from utils.evaluation.questions import FOLDERS
from utils.evaluation.statistics import ALPHA, compare_paired, mcnemar_exact, show_rate

DIFFICULTY = (0.56, 0.46)
EXPECTED_ASKED = 0.1  # what 00 expects of a run with room to finish, see statistics.detectable_difference
Forms = tuple[np.ndarray, np.ndarray]  # the base's and the fine-tuned model's, see read_forms
VERDICTS = ("better", "worse", "cannot tell")


@dataclass(frozen=True)
class Case:
    """One truth. `asked` is the share of answers without a letter, None: as in the real ones."""

    gain: float = 0.0  # points of knowledge, as a share
    asked: float | None = None
    letters_kept: float = 1.0  # of the letters that the fine-tuned model would state
    finishes: bool = False  # the fine-tuned model never runs into the limit
    asked_right: float = 1.0  # how often the letter asked for is the one meant; else any of four
    answers: Literal["completions", "SmolLM2"] = "completions"  # whose forms are drawn


CASES = {
    "no difference": Case(),
    "fewer letters, same knowledge": Case(letters_kept=0.4),
    "shorter, same knowledge": Case(finishes=True),
    "fewer letters, and asking misses one in ten": Case(letters_kept=0.4, asked_right=0.9),
    "gain of 5 points": Case(gain=0.05, asked=EXPECTED_ASKED),
    "gain of 8 points": Case(gain=0.08, asked=EXPECTED_ASKED),
    "gain of 12 points": Case(gain=0.12, asked=EXPECTED_ASKED),
    "gain of 12 points, four in ten cut off": Case(gain=0.12),
    "SmolLM2 before and after, same knowledge": Case(answers="SmolLM2"),
    "SmolLM2 before and after, and asking misses one in ten": Case(asked_right=0.9, answers="SmolLM2"),
}


def read_forms(sample: Path) -> np.ndarray:
    """(finished, states an option) of every completion, as 0/1, shape (completions, 2)."""
    rows = read_lines(sample)
    parsed = [parse_completion(row["completion"]) for row in rows]
    stated = [explicit_letter(one.answer, row["options"]) is not None for one, row in zip(parsed, rows, strict=True)]
    return np.array([[one.closed, letter] for one, letter in zip(parsed, stated, strict=True)], dtype=float)


def read_own(answers: Path, items: Path) -> tuple[np.ndarray, dict[str, float]]:
    """(what `read_forms` gives, shares of all and mean length in tokens) of a model's answers to multiple-choice items."""
    options = {item["id"]: item["options"] for item in read_lines(items)}
    given = [row for row in read_lines(answers) if row["kind"] == "choice"]
    texts = [(parse_completion(row["text"]).answer, options[row["id"]]) for row in given]
    stated = np.array([explicit_letter(text, its) is not None for text, its in texts])
    lettered = np.array([explicit_letter(text, dict.fromkeys(its, "")) is not None for text, its in texts])
    finished = np.array([row["finish_reason"] == "stop" for row in given])
    shares = {
        "letter": finished & lettered,
        "named_in_words": finished & stated & ~lettered,
        "neither": finished & ~stated,
        "cut_off": ~finished,
        "tokens": [row["tokens"] for row in given],
    }
    told = {name: round(float(np.mean(values)), 4) for name, values in shares.items()}
    return np.column_stack([finished, stated]).astype(float), {"answers": len(given), **told}


def draw_answers(case: Case, tuned: bool, right: np.ndarray, forms: np.ndarray, rng: np.random.Generator) -> dict:
    """0/1 for each question: strict, forced, and whether an option was stated, as metrics.score_answers has them."""
    n = len(right)
    if case.asked is not None:
        finished, stated = np.ones(n), (rng.random(n) >= case.asked).astype(float)
    else:
        finished, stated = forms[rng.integers(len(forms), size=n)].T
    if tuned and case.finishes:
        finished = stated = np.ones(n)
    if tuned:
        stated = stated * (rng.random(n) < case.letters_kept)
    meant = np.where(rng.random(n) < case.asked_right, right, rng.random(n) < 0.25)
    return {"strict": stated * finished * right, "forced": np.where(stated, right, meant), "parsed": stated}


def run_experiment(case: Case, n: int, forms: Forms, rng: np.random.Generator) -> str:
    """The verdict on "knows more" of one simulated run."""
    chance = rng.beta(*DIFFICULTY, size=n)
    gained = rng.random(n) < case.gain / (1 - DIFFICULTY[0] / sum(DIFFICULTY))  # of what the base does not know
    right = [(rng.random(n) < chance).astype(float) for _ in range(2)]
    right[1] = np.maximum(right[1], gained)
    base, tuned = (draw_answers(case, bool(i), right[i], forms[i], rng) for i in range(2))
    if any(mcnemar_exact(base[name], tuned[name]) >= ALPHA for name in ("strict", "forced")):
        return "cannot tell"  # the rule's own first condition: the intervals need not be drawn
    names = {"multiple_choice": "strict", "multiple_choice_forced": "forced", "parsed": "parsed"}
    ids = [f"q{i}" for i in range(n)]
    results = {name: compare_paired(name, base[key], tuned[key], ids, resamples=1000) for name, key in names.items()}
    return decide("multiple_choice", results, {})[0]


def measure(case: Case, n: int, experiments: int, forms: Forms, seed: int) -> dict:
    """The share of each verdict; for a true gain under what 00 expects, also what it announces."""
    rng = np.random.default_rng(seed)
    verdicts = [run_experiment(case, n, forms, rng) for _ in range(experiments)]
    found = {verdict.replace(" ", "_"): verdicts.count(verdict) / experiments for verdict in VERDICTS}
    expected = case.gain > 0 and case.asked == EXPECTED_ASKED
    announced = {"announced": round(show_rate(n, case.gain, asked=EXPECTED_ASKED), 3)} if expected else {}
    return {"n": n, "experiments": experiments, **found, **announced}


def draw(cases: dict[str, dict], path: Path) -> None:
    """Each case's share of "better" and "worse", and what 00 announced."""
    figure, axes = plt.subplots(figsize=(8.5, 0.5 * len(cases) + 1.2), layout="constrained")
    names = list(cases)[::-1]
    for verdict, colour, sign in (("better", "#2b7a78", 1), ("worse", "#c0504d", -1)):
        shares = [100 * cases[name][verdict] for name in names]
        axes.barh(names, [sign * share for share in shares], color=colour, label=f"says “{verdict}”")
        for place, share in enumerate(shares):
            if share:
                inside = share > 15
                x, text_colour = sign * (share - 1 if inside else share + 1), "white" if inside else "black"
                side = "left" if (sign > 0) != inside else "right"
                axes.text(x, place, f"{share:.1f}", va="center", ha=side, color=text_colour, fontsize=9)
    announced = [
        (100 * cases[name]["announced"], place) for place, name in enumerate(names) if "announced" in cases[name]
    ]
    axes.plot(*zip(*announced, strict=True), "D", color="black", markersize=5, label="announced by 00")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlim=(-15, 112), xlabel=f"% of {next(iter(cases.values()))['experiments']:,} simulated runs")
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(
    sample: Path,
    run: Path,
    items: Path,
    out: Annotated[Path, typer.Option(help="Where the shares go, JSON; the figure beside it.")],
    n: Annotated[int, typer.Option(help="Questions in a run.")] = 600,
    experiments: int = 2000,
    seed: int = 20261126,
) -> None:
    """Simulate every case with the answers in SAMPLE, or those to ITEMS in RUN, write the shares to OUT and draw them."""
    forms = read_forms(sample)
    (base, base_told), (tuned, tuned_told) = (
        read_own(run / name / "answers.jsonl", items) for name in FOLDERS.values()
    )
    pairs = {"completions": (forms, forms), "SmolLM2": (base, tuned)}
    cases = {
        name: measure(case, n, experiments, pairs[case.answers], seed + i)
        for i, (name, case) in enumerate(CASES.items())
    }
    finished, stated = forms.mean(axis=0).round(4)
    real = {"completions": len(forms), "finished": finished, "state_an_option": stated}
    latent = {"difficulty": DIFFICULTY, "expected_asked": EXPECTED_ASKED}
    own = {"base": base_told, "tuned": tuned_told}
    add_to_file(out, {"latent": latent, "real_answers": real, "smollm2_answers": own, "cases": cases})
    draw(cases, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
