"""The table of faults: `python -m tests.faults.table RESULTS README`, from the records of one run of the suite."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment

VERSIONS = ("torch", "transformers", "trl", "peft", "papermill")
TEMPLATE = Path(__file__).with_name("README.md.j2")


def read_rows(results: Path) -> list[dict]:
    """One row for each area and kind of fault: tried and survived summed, the worst of the lost seconds or None."""
    rows: dict[tuple[str, str], dict] = {}
    for file in sorted(results.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            empty = {"area": record["area"], "kind": record["kind"], "tried": 0, "survived": 0, "lost_seconds": None}
            row = rows.setdefault((record["area"], record["kind"]), empty)
            row["tried"] += record["tried"]
            row["survived"] += record["survived"]
            lost = [seconds for seconds in (row["lost_seconds"], record["lost_seconds"]) if seconds is not None]
            row["lost_seconds"] = max(lost, default=None)
    return sorted(rows.values(), key=lambda row: (row["area"], row["kind"]))


def in_full(results: Path) -> bool:
    """Whether every record is of `make faults`, and none of the short form that CI runs."""
    lines = [line for file in results.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]
    return all(json.loads(line).get("in_full") for line in lines)


def render(rows: list[dict], full: bool = True) -> str:
    """The README's text."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)
    lost = [row["lost_seconds"] for row in rows if row["lost_seconds"] is not None]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        rows=rows,
        full=full,
        tried=sum(row["tried"] for row in rows),
        survived=sum(row["survived"] for row in rows),
        worst=max(lost, default=None),
        date=datetime.now(UTC).strftime("%d %B %Y").lstrip("0"),
        machine=f"{len(os.sched_getaffinity(0))} CPU cores, {platform.system()}",
        versions=", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in VERSIONS)]),
    )


if __name__ == "__main__":
    results, readme = map(Path, sys.argv[1:])
    found = read_rows(results)
    if not found:
        raise SystemExit(f"{results} holds no records; run make faults, which writes them.")
    readme.write_text(render(found, in_full(results)), encoding="utf-8")
    print(readme)
