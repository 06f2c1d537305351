"""What would break on an upgrade? `python -m tests.drift` (make drift), and `python -m tests.drift pin` after a change of pins.

`newest` fetches by pip, without installing, the newest wheels that unsloth and the others still accept of each other, and
holds every keyword that we pass against them and against the pinned ones. `pin` writes the pinned signatures that our calls
need to tests/signatures.json, by which the tests check the same without a network.
"""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

from tests.drift.calls import Call, find_calls
from tests.drift.signatures import Signature, Sources
from utils.files import write_json
from utils.hardware import read_pins
from utils.project import ROOT

FILE = ROOT / "tests" / "signatures.json"
# In this order each one's demands hold for those after it: what is "allowed" is what fits together.
PACKAGES = (
    "unsloth",
    "unsloth_zoo",
    "trl",
    "transformers",
    "peft",
    "datasets",
    "wandb",
    "huggingface_hub",
    "kaggle",
    "kagglesdk",
)
app = typer.Typer(add_completion=False)


def pinned_versions() -> dict[str, str]:
    """{package: version} by requirements.txt; kagglesdk's, which kaggle chooses, is the installed one."""
    pins = read_pins()
    versions = {}
    for package in PACKAGES:
        pin = pins.get(package.replace("_", "-"))
        exact = [spec.version for spec in pin.specifier if spec.operator == "=="] if pin else []
        versions[package] = exact[0] if exact else installed_version(package)
    return versions


def fetch(package: str, allowed: str, folder: Path) -> Path:
    """The newest wheel of a package within a specifier; raises typer.Exit with pip's last line where there is none."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder),
               f"{package}{allowed}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        Console(stderr=True).print(f"pip could not fetch {package}{allowed}: {last}", markup=False, soft_wrap=True)
        raise typer.Exit(3)
    name = canonicalize_name(package).replace("-", "_")
    return next(path for path in folder.glob("*.whl") if path.name.lower().startswith(f"{name}-"))


def demands(wheel: Path) -> dict[str, SpecifierSet]:
    """{package: specifier} of what a wheel asks of the others in PACKAGES, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        lines = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    asked: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name).replace("-", "_")
        if name in PACKAGES and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            asked[name] = asked.get(name, SpecifierSet()) & requirement.specifier
    return asked


def fetch_newest(folder: Path, together: bool = True) -> list[Path]:
    """The newest wheels that fit together, or simply the newest ones."""
    allowed: dict[str, SpecifierSet] = {}
    wheels = []
    for package in PACKAGES:
        wheels.append(fetch(package, str(allowed.get(package, "")), folder))
        for name, specifier in demands(wheels[-1]).items() if together else ():
            allowed[name] = allowed.get(name, SpecifierSet()) & specifier
    return wheels


def fetch_pinned(folder: Path) -> list[Path]:
    """The pinned wheels."""
    return [fetch(package, f"=={version}", folder) for package, version in pinned_versions().items()]


def verdict(call: Call, signatures: dict[str, Signature | None]) -> str:
    """`ok` where one of the call's targets takes the keyword; `unchecked` where one may; else `missing`.

    `no such name` where none of them is there at all.
    """
    found = [signature for target in call.targets if (signature := signatures.get(target)) is not None]
    if not found:
        return "no such name"
    if call.keyword == "**":
        return "unchecked"
    said = {signature.verdict(call.keyword) for signature in found}
    return next(word for word in ("ok", "unchecked", "missing") if word in said)


def read_signatures(sources: Sources, calls: list[Call]) -> dict[str, Signature | None]:
    """The signature of everything that is called; None where it is not there."""
    return {target: sources.find(target) for target in sorted({t for call in calls for t in call.targets})}


def pinned_signatures() -> tuple[dict[str, str], dict[str, Signature | None]]:
    """(versions, signatures) on file."""
    held = json.loads(FILE.read_text(encoding="utf-8"))
    read = {
        name: entry and Signature(frozenset(entry["names"]), entry["open"])
        for name, entry in held["signatures"].items()
    }
    return held["versions"], read


def versions_of(wheels: list[Path]) -> dict[str, str]:
    return {package: wheel.name.split("-")[1] for package, wheel in zip(PACKAGES, wheels, strict=True)}


@app.command()
def pin() -> None:
    """Write the pinned signatures to tests/signatures.json."""
    calls = find_calls()
    with tempfile.TemporaryDirectory() as scratch:
        wheels = fetch_pinned(Path(scratch))
        signatures = read_signatures(Sources.of_wheels(wheels), calls)
    entries = {name: found and {"names": sorted(found.names), "open": found.open} for name, found in signatures.items()}
    write_json(FILE, {"versions": versions_of(wheels), "signatures": entries})
    print(f"{len(entries)} signatures in {FILE.relative_to(ROOT)}")


@app.callback(invoke_without_command=True)
def newest(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Show what is in order, too.")] = False,
    beyond: Annotated[bool, typer.Option(help="The newest there are, whether or not they fit together.")] = False,
) -> None:
    """Hold our keywords against the newest allowed versions; exit 1 where one is gone."""
    if context.invoked_subcommand:
        return
    calls, (pinned, before) = find_calls(), pinned_signatures()
    with tempfile.TemporaryDirectory() as scratch:
        wheels = fetch_newest(Path(scratch), together=not beyond)
        after = read_signatures(Sources.of_wheels(wheels), calls)
    console, moved = Console(), versions_of(wheels)
    table = Table("place", "call", "keyword", "pinned", "newest")
    counts: dict[str, int] = {}
    for call in calls:
        now, then = verdict(call, before), verdict(call, after)
        counts[then] = counts.get(then, 0) + 1
        if everything or {now, then} - {"ok", "unchecked"}:
            table.add_row(call.place, " or ".join(call.targets), call.keyword, now, then)
    versions = Table("package", "pinned", "newest" if beyond else "newest allowed")
    for package, found in moved.items():
        versions.add_row(package, pinned[package], found if found != pinned[package] else "the same")
    console.print(versions)
    if table.row_count:
        console.print(table)
    broken = sum(count for word, count in counts.items() if word not in ("ok", "unchecked"))
    console.print(f"{len(calls)} keywords: {counts.get('ok', 0)} in order, {broken} would break, {counts.get('unchecked', 0)} go into a "
                  "**kwargs and cannot be checked", soft_wrap=True)  # fmt: skip
    raise typer.Exit(int(broken > 0))


if __name__ == "__main__":
    app()
