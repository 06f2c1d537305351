"""What the split costs at full size: 20,000 questions against each other and against 1,273 long benchmark items.

    python -m benchmarks.split --rows medical_o1_sample.jsonl --items medqa_sample.jsonl \
        --out benchmarks/results/split.json

The questions are recombined from real ones, word by word, since the real 20,000 are not at hand: their lengths and
wording are real, their meaning is not. Their vocabulary is smaller than the real one, so more of them share a sequence
and the product is denser: the time is, if anything, too long. Recall is measured on tests/planted/ hidden among them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from utils.files import write_json
from utils.hardware import installed
from utils.project import ROOT

QUESTIONS, ITEMS = 20_000, 1_273
_PACKAGES = ("scikit-learn", "sparse_dot_topn", "scipy", "numpy", "pandas")


def recombine(count: int, texts: list[str], rng: np.random.Generator) -> list[str]:
    """`count` texts that are as long as the real ones and go from word to word as they do, three times out of four."""
    follows: dict[str, list[str]] = {}
    for text in texts:
        words = text.split()
        for word, following in pairwise(words):
            follows.setdefault(word, []).append(following)
    starts = list(follows)
    made = []
    for _ in range(count):
        length = max(5, int(len(texts[rng.integers(len(texts))].split()) * rng.uniform(0.8, 1.2)))
        words = [starts[rng.integers(len(starts))]]
        while len(words) < length:
            choices = follows.get(words[-1], starts) if rng.random() < 0.75 else starts
            words.append(choices[rng.integers(len(choices))])
        made.append(" ".join(words))
    return made


def read_column(path: Path, column: str) -> list[str]:
    """One column of a JSONL file."""
    return [json.loads(line)[column] for line in path.read_text(encoding="utf-8").splitlines()]


def write_inputs(folder: Path, rows: Path, items: Path) -> int:
    """rows.jsonl and items.jsonl of full size, planted rewrites among them; returns how many were planted."""
    rng = np.random.default_rng(3407)
    planted = [
        json.loads(line)
        for path in sorted((ROOT / "tests" / "planted").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    questions = recombine(QUESTIONS - len(planted), read_column(rows, "Question"), rng)
    stems = recombine(ITEMS - len(planted), read_column(items, "question"), rng)
    questions += [pair["rewrite"] for pair in planted]
    stems += [pair["source"] for pair in planted]
    lines = [json.dumps({"Question": q, "Complex_CoT": "-", "Response": "-"}) for q in questions]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lines = [json.dumps({"question": s, "options": {"A": "-", "B": "+"}, "answer_idx": "A"}) for s in stems]
    (folder / "items.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return len(planted)


def measure(folder: Path, planted: int) -> dict:
    """Seconds and peak memory of reading and splitting, and what was found; to be run in a fresh process."""
    from utils.config import load_config
    from utils.data.benchmarks import load_benchmarks
    from utils.data.split import split_rows

    settings = {"data.path": str(folder / "rows.jsonl"), "data.eval_rows": 200, "data.train_rows": None}
    settings |= {"evaluate.benchmark.path": str(folder / "items.jsonl"), "evaluate.benchmark.rows": ITEMS}
    config = load_config("demo", settings)
    started = time.monotonic()
    items = load_benchmarks(config.evaluate)
    train, _, held_out, report = split_rows(config, items)
    seconds = time.monotonic() - started
    near = {entry["row"] for entry in report["dropped"] if entry["reason"] == "near duplicate of a benchmark item"}
    hits = len(near & set(range(QUESTIONS - planted + 1, QUESTIONS + 1)))
    sizes = [len(text) for text in train["Question"]]
    return {
        "seconds": round(seconds, 1),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "questions": QUESTIONS,
        "mean_characters": round(float(np.mean(sizes))),
        "items": len(items),
        "item_mean_characters": round(float(items["stem"].str.len().mean())),
        "planted": planted,
        "planted_found": hits,
        "others_dropped": len(near) - hits,
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "contamination": report["contamination"],
        "largest_group": int(train["group"].value_counts().max()),
    }


def main(
    rows: Annotated[Path, typer.Option(help="Real training rows, JSONL.")],
    items: Annotated[Path, typer.Option(help="Real benchmark items, JSONL.")],
    out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")],
    scratch: Annotated[Path, typer.Option(help="Where the full-size files are written.")] = Path(
        "/tmp/split-benchmark"
    ),
) -> None:
    """Write the inputs, measure in a process of its own, write the evidence to OUT."""
    scratch.mkdir(parents=True, exist_ok=True)
    planted = write_inputs(scratch, rows, items)
    code = (
        "import json; from pathlib import Path; from benchmarks.split import measure; "
        f"print(json.dumps(measure(Path({str(scratch)!r}), {planted})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    evidence = {
        "what": "reading and splitting 20,000 recombined questions against 1,273 recombined items",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": "2 CPU cores",
        "versions": {package: installed(package) for package in _PACKAGES},
        **json.loads(done.stdout.splitlines()[-1]),
    }
    write_json(out, evidence)
    print(json.dumps(evidence, indent=2))


if __name__ == "__main__":
    typer.run(main)
