"""No secret in what is committed: `python -m tests.secret_scan [--accept]`, part of `make lint`.

detect-secrets looks at every file that git knows, with its own plugins and the tokens' shapes of ours. What it finds and is
none (a commit's digest, a test's canary) is listed, hashed, in secrets.baseline.json; `--accept` writes that list anew:
read the difference before you commit it. The generated kernel notebook is left out: it holds these same files, packed.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Annotated

import typer
from detect_secrets import SecretsCollection
from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.settings import transient_settings

from utils.files import write_json
from utils.project import ROOT

BASELINE = ROOT / "tests" / "secrets.baseline.json"
_LEFT_OUT = ".png"
_UNREADABLE = "tests/faults/corpus/config/"  # YAML made to end its readers, this scan's among them
_FILTERS = (
    "is_indirect_reference is_likely_id_string is_lock_file is_not_alphanumeric_string is_potential_uuid "
    "is_prefixed_with_dollar_sign is_sequential_string is_swagger_file is_templated_secret".split()
)
_DIGEST = [r"^[0-9a-f]{64}$"]  # a sha256: no token has that form, and our results are full of them
_OURS = {"name": "TokenDetector", "path": f"file://{ROOT / 'tests' / 'token_shapes.py'}"}


def tracked(root: Path = ROOT) -> list[str]:
    """Files that git knows or would add, below `root`."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    generated = ("kaggle_kernel.ipynb", "tests/secrets.baseline.json")
    return [
        name
        for name in names
        if name
        and name not in generated
        and not name.endswith(_LEFT_OUT)
        and not name.startswith(_UNREADABLE)
        and (root / name).is_file()
    ]


def scan(names: list[str], root: Path = ROOT) -> dict[tuple[str, str, str], int]:
    """{(file, kind, sha1 of the secret): line} of everything that looks like a secret."""
    get_mapping_from_secret_type_to_class.cache_clear()
    theirs = {kind.__name__ for kind in get_mapping_from_secret_type_to_class().values()} - {_OURS["name"]}
    get_mapping_from_secret_type_to_class.cache_clear()  # or it would not look for ours
    filters = [{"path": f"detect_secrets.filters.heuristic.{name}"} for name in _FILTERS]
    filters.append({"path": "detect_secrets.filters.regex.should_exclude_secret", "pattern": _DIGEST})
    settings = {"plugins_used": [*({"name": name} for name in sorted(theirs)), _OURS], "filters_used": filters}
    with transient_settings(settings):
        found = SecretsCollection(root=str(root))
        for name in names:
            found.scan_file(name)
        return {(file, secret.type, secret.secret_hash): secret.line_number for file, secret in found}


def main(accept: Annotated[bool, typer.Option(help="Take what is found now for no secret.")] = False) -> None:
    """Exit 1 where there is something that is not on the list."""
    found = scan(tracked())
    if accept:
        write_json(BASELINE, sorted(map(list, found)))
    known = {tuple(entry) for entry in json.loads(BASELINE.read_text(encoding="utf-8"))}
    unknown = sorted(
        (file, line, kind) for (file, kind, digest), line in found.items() if (file, kind, digest) not in known
    )
    for file, line, kind in unknown:
        print(f"{file}:{line}: {kind}")
    print(f"secret scan: {len(unknown)} new, {len(set(found) & known)} known to be none")
    raise typer.Exit(int(bool(unknown)))


if __name__ == "__main__":
    typer.run(main)
