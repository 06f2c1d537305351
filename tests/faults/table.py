"""The table of faults in README.md, from the reports of one run of the suite."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment

VERSIONS = ("torch", "transformers", "trl", "peft", "papermill")
TEMPLATE = Path(__file__).with_name("README.md.j2")


def read_rows(reports: list) -> list[dict]:
    """One row for each area and kind of fault, of pytest's reports on tests that called `fault`."""
    rows: dict[tuple[str, str], dict] = {}
    for report in (report for report in reports if report.when == "call"):
        area = Path(report.nodeid.partition("::")[0]).stem.removeprefix("test_").replace("_", " ")
        for kind, tried, lost in (value for name, value in report.user_properties if name == "fault"):
            empty = {"area": area, "kind": kind, "tried": 0, "survived": 0, "lost_seconds": None}
            row = rows.setdefault((area, kind), empty)
            row["tried"] += tried
            row["survived"] += tried if report.passed else 0
            row["lost_seconds"] = max((s for s in (row["lost_seconds"], lost) if s is not None), default=None)
    return [rows[key] for key in sorted(rows)]


def render(rows: list[dict]) -> str:
    """The README's text."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        rows=rows,
        tried=sum(row["tried"] for row in rows),
        survived=sum(row["survived"] for row in rows),
        worst=max((row["lost_seconds"] for row in rows if row["lost_seconds"] is not None), default=None),
        date=datetime.now(UTC).strftime("%d %B %Y").lstrip("0"),
        machine=f"{len(os.sched_getaffinity(0))} CPU cores, {platform.system()}",
        versions=", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in VERSIONS)]),
    )
