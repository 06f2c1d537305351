"""Are the pinned packages known to be vulnerable? `python -m tests.audit [--strict]`, part of `make lint`.

Where OSV's advisories can be asked, pip-audit asks for every exact pin; otherwise the age of the pins is told, which says
how long nobody has looked. The last line says which of the two was done. Without `--strict` an advisory does not end in
exit 1: what is unchanged should not turn red overnight.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from utils.project import ROOT

FILES = ("requirements.txt", "requirements-cpu.txt")
OLD_DAYS = 180
_WAIT_S = 4.0  # a resolver without a network can take longer than any of its timeouts


def exact_pins() -> dict[str, str]:
    """{package: version} of every line `name==version` in the requirements files."""
    pins = {}
    for name in FILES:
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if found := re.match(r"([A-Za-z0-9._-]+)==([^\s#;]+)", line):
                pins[found[1]] = found[2]
    return pins


def osv_answers() -> bool:
    """Whether OSV answers within a few seconds."""
    return _within(_ask_osv)


def _ask_osv() -> bool:
    import requests

    query = {"package": {"name": "six", "ecosystem": "PyPI"}, "version": "1.17.0"}
    return requests.post("https://api.osv.dev/v1/query", json=query, timeout=3).ok


def _within(ask: Callable[[], bool], seconds: float = _WAIT_S) -> bool:
    answers: list[bool] = []

    def work() -> None:
        try:
            answers.append(ask())
        except Exception:  # no network, a proxy's page, no JSON: nobody to ask
            answers.append(False)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers and answers[0])


def ask_advisories(pins: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """(package, version, advisory, fixed in) of every known vulnerability; raises RuntimeError where pip-audit fails."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted, answer = Path(scratch) / "pins.txt", Path(scratch) / "answer.json"
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(wanted), "--no-deps", "--disable-pip",
                   "--vulnerability-service", "osv", "--format", "json", "--output", str(answer), "--timeout", "10",
                   "--progress-spinner", "off"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            return read_answer(json.loads(answer.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):  # a rate limit, a service that is down, half of an answer
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1]) from None


def read_answer(answer: dict) -> list[tuple[str, str, str, str]]:
    """The findings in pip-audit's JSON."""
    return [
        (package["name"], package["version"], advisory["id"], ", ".join(advisory["fix_versions"]) or "nothing yet")
        for package in answer["dependencies"]
        for advisory in package.get("vulns", [])
    ]


def ages(name: str, root: Path = ROOT) -> dict[str, int]:
    """{package: days since its line was written}, from git; empty outside a checkout."""
    command = ["git", "-C", str(root), "blame", "--line-porcelain", name]
    blame = subprocess.run(command, capture_output=True, text=True, check=False)
    found, moment = {}, 0
    for line in blame.stdout.splitlines():
        if line.startswith("author-time "):
            moment = int(line.split()[1])
        elif line.startswith("\t") and (pin := re.match(r"\t([A-Za-z0-9._-]+)\s*[=<>]=", line)):
            found[pin[1]] = int((time.time() - moment) // 86400)
    return found


def main(
    strict: Annotated[bool, typer.Option(help="Exit 1 where there is an advisory, or nobody to ask.")] = False,
) -> None:
    """Ask the advisories, or tell the pins' age."""
    console, pins = Console(), exact_pins()
    findings, why = None, "no advisory source answers"
    if osv_answers():
        try:
            findings = ask_advisories(pins)
        except RuntimeError as error:
            why = f"pip-audit failed ({error})"
    if findings is not None:
        table = Table("package", "version", "advisory", "fixed in", title="known vulnerabilities")
        for finding in findings:
            table.add_row(*finding)
        if findings:
            console.print(table)
        console.print(
            f"audit: {len(pins)} exact pins against osv's advisories, {len(findings)} findings", soft_wrap=True
        )
        raise typer.Exit(int(strict and bool(findings)))
    days = {package: age for name in FILES for package, age in ages(name).items()}
    old = sorted(package for package, age in days.items() if age > OLD_DAYS)
    if old:
        console.print(f"pinned more than {OLD_DAYS} days ago: {', '.join(old)}", soft_wrap=True)
    oldest = (
        f"the oldest of {len(days)} pins is {max(days.values())} days old"
        if days
        else "and no git to tell the pins' age"
    )
    console.print(f"audit: {why}, nothing was looked up; {oldest}", soft_wrap=True, markup=False)
    raise typer.Exit(int(strict))


if __name__ == "__main__":
    typer.run(main)
