"""Cells of ten megabytes: read right or refused in a sentence, in memory and time that are known beforehand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CELL = 10 * 2**20
LIMITS = {
    ".jsonl": 12,
    ".json": 12,
    ".csv": 12,
    ".parquet": 16,
}  # times the cell: the text, its row, its frame, one copy
MEASURE = """
import json, resource, sys, time
from pathlib import Path
from utils.data import check_rows, read_table
from utils.errors import UserError

def load(path):
    try:
        return len(check_rows(read_table(path), path.name))
    except UserError as error:
        return str(error)

small, large = Path(sys.argv[1]), Path(sys.argv[2])
load(small)
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
found = load(large)
print(json.dumps({"found": found, "seconds": time.monotonic() - started,
                  "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}))
"""
WRITE = """
import sys, pandas as pd
from pathlib import Path
for name, size in (("small", 10), ("large", int(sys.argv[2]))):
    path = Path(sys.argv[1]) / f"{name}{sys.argv[3]}"
    frame = pd.DataFrame([{"Question": "Why 医?", "Complex_CoT": "x " * (size // 2), "Response": "r"}])
    {".jsonl": lambda: frame.to_json(path, orient="records", lines=True), ".json": lambda: frame.to_json(path, orient="records"),
     ".csv": lambda: frame.to_csv(path, index=False), ".parquet": lambda: frame.to_parquet(path, index=False)}[path.suffix]()
"""


def measure(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout) if done.stdout else {}


@pytest.mark.parametrize("suffix", LIMITS)
def test_a_cell_of_ten_megabytes_is_read_in_bounded_memory(suffix, tmp_path, record_fault):
    measure(WRITE, str(tmp_path), str(CELL), suffix)
    found = measure(MEASURE, str(tmp_path / f"small{suffix}"), str(tmp_path / f"large{suffix}"))
    survived = found["found"] == 1 and found["bytes"] < LIMITS[suffix] * CELL and found["seconds"] < 30
    record_fault("a cell of 10 MB", survived=int(survived))
    assert survived, found


@pytest.mark.parametrize(
    "content",
    [
        b'{"Question": "' + b"x" * CELL,
        b'{"Question": ' + b"[" * CELL,
        b'{"Question": ' + b"9" * CELL + b"}",
        b'Question,Complex_CoT,Response\n"' + b"x" * CELL,
        b"\x00" * CELL,
        b"," * CELL,
        b"Q" * CELL + b",a,b\n1,2,3\n",
    ],
    ids=["open string", "brackets", "digits", "open quote", "null bytes", "commas", "a header of 10 MB"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_ten_megabytes_of_nonsense_end_in_one_short_sentence(suffix, content, tmp_path, record_fault):
    (tmp_path / f"large{suffix}").write_bytes(content)
    (tmp_path / f"small{suffix}").write_bytes(b"Question,Complex_CoT,Response\nq,c,r\n")
    found = measure(MEASURE, str(tmp_path / f"small{suffix}"), str(tmp_path / f"large{suffix}"))
    survived = len(str(found["found"])) < 1010 and found["seconds"] < 30 and found["bytes"] < 150 * CELL
    record_fault("10 MB of nonsense", survived=int(survived))
    assert survived and isinstance(found["found"], str), found
