"""Cells of ten megabytes: read right or refused in a sentence, in memory and time that are known beforehand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from utils.project import ROOT

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
from utils.data.rows import check_rows, read_table
from utils.errors import UserError

def load(path):
    try:
        return len(check_rows(read_table(path), path.name))
    except UserError as error:
        return str(error)

small, *large = map(Path, sys.argv[1:])
load(small)
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
found = [load(path) for path in large]
print(json.dumps({"found": found, "seconds": time.process_time() - started,
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
        [sys.executable, "-c", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    return json.loads(done.stdout) if done.stdout else {}


@pytest.mark.parametrize("suffix", LIMITS)
def test_a_cell_of_ten_megabytes_is_read_in_bounded_memory(suffix, tmp_path, record_fault):
    measure(WRITE, str(tmp_path), str(CELL), suffix)
    found = measure(MEASURE, str(tmp_path / f"small{suffix}"), str(tmp_path / f"large{suffix}"))
    survived = found["found"] == [1] and found["bytes"] < LIMITS[suffix] * CELL and found["seconds"] < 30
    record_fault("a cell of 10 MB", survived=int(survived))
    assert survived, found


NONSENSE = {
    "open string": b'{"Question": "' + b"x" * CELL,
    "brackets": b'{"Question": ' + b"[" * CELL,
    "digits": b'{"Question": ' + b"9" * CELL + b"}",
    "open quote": b'Question,Complex_CoT,Response\n"' + b"x" * CELL,
    "null bytes": b"\x00" * CELL,
    "commas": b"," * CELL,
    "long header": b"Q" * CELL + b",a,b\n1,2,3\n",
}


def test_ten_megabytes_of_nonsense_end_in_one_short_sentence_each(tmp_path, record_fault):
    small = tmp_path / "small.csv"
    small.write_bytes(b"Question,Complex_CoT,Response\nq,c,r\n")
    large = [tmp_path / f"{name}{suffix}" for name in NONSENSE for suffix in (".jsonl", ".csv")]
    for path in large:
        path.write_bytes(NONSENSE[path.stem])
    found = measure(MEASURE, str(small), *map(str, large))
    told = [
        isinstance(sentence, str) and sentence.isprintable() and len(sentence) < 1010 for sentence in found["found"]
    ]
    record_fault("10 MB of nonsense", tried=len(large), survived=sum(told))
    assert all(told) and found["seconds"] < 60 and found["bytes"] < 150 * CELL, found
