"""The series in one self-contained notebook, for Kaggle's push (which carries one file) and for Colab.

The package, the notebooks and the pins travel as a zip inside one cell; the notebook checks the digest, unpacks them
into scratch, installs what is missing, and runs the series in fresh processes. `build_single` makes one numbered
notebook self-contained in the same way.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from utils.errors import UserError
from utils.files import write_text
from utils.kaggle import kernel_cells
from utils.pipeline.stages import find_stage
from utils.project import NAME, ROOT

KERNEL = ROOT / "kaggle_kernel.ipynb"
SINGLES = ROOT / "bundles"
BUNDLE_COMMAND = "python -m utils bundle"
MAXIMUM_BYTES = 900_000  # Kaggle refuses a source of 1 MB with a bare "400 Client Error"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


class BundleError(UserError):
    """The generated kernel notebook is missing, out of date, or too large to push."""


def bundled_files() -> list[Path]:
    """What travels: the package, the notebooks with their profiles, the pins."""
    patterns = ("utils/**/*.py", "utils/report/templates/*.j2", "notebooks/*.ipynb", "notebooks/profiles/*.yaml")
    return sorted([*(path for pattern in patterns for path in ROOT.glob(pattern)), ROOT / "requirements.txt"])


def build_kernel() -> nbformat.NotebookNode:
    """The kernel notebook, the same for the same files."""
    cells = [
        _markdown("kernel-00", kernel_cells.INTRODUCTION),
        _code("kernel-01", kernel_cells.PARAMETERS, "parameters"),
        _code("kernel-02", _materialise()),
        _code("kernel-03", kernel_cells.PREPARE),
        _code("kernel-04", kernel_cells.RUN),
        _code("kernel-05", kernel_cells.SHOW),
        _markdown("kernel-06", kernel_cells.NEXT),
    ]
    return _notebook(cells)


def build_single(number: str) -> nbformat.NotebookNode:
    """One numbered notebook with the package inside: its bootstrap cell unpacks instead of looking around.

    Raises BundleError for a number that there is not.
    """
    try:
        stage = find_stage(number)
    except (KeyError, ValueError):
        raise BundleError(f"There is no notebook {number!r}; there are 00 to 05.") from None
    cells = nbformat.read(stage.notebook, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    bootstrap, parameters = code[0], code[1]
    bootstrap.source = (_materialise().strip() + "\n" + kernel_cells.SINGLE_PREPARE.rstrip()).strip()
    at = cells.index(parameters) + 1
    cells[at:at] = [_code(f"{stage.number}-attached", kernel_cells.SINGLE_ADOPT)]
    cells.insert(len(cells) - 1, _code(f"{stage.number}-output", kernel_cells.SINGLE_END))
    return _notebook(cells)


def _materialise() -> str:
    """The cell that carries the archive, with its listing and checksums."""
    files = bundled_files()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bundle:
        for path in files:
            # A fixed date: the same files give the same archive.
            entry = zipfile.ZipInfo(path.relative_to(ROOT).as_posix(), _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            bundle.writestr(entry, path.read_bytes())
    packed = archive.getvalue()
    fields = {
        "LISTING": "\n".join(
            f"#   {path.relative_to(ROOT).as_posix()} ({path.stat().st_size:,} bytes)" for path in files
        ),
        "DIGEST": content_digest(files),
        "ARCHIVE": "\n".join(textwrap.wrap(base64.b64encode(packed).decode(), 120)),
        "CHECKSUM": hashlib.sha256(packed).hexdigest(),
        "NAME": NAME,
    }
    text = kernel_cells.MATERIALISE
    for name, value in fields.items():
        text = text.replace(f"@{name}@", value)
    return text


def _markdown(name: str, source: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_markdown_cell(source.strip(), id=name)


def _code(name: str, source: str, tag: str = "") -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell(source.strip(), id=name)
    if tag:
        cell.metadata["tags"] = [tag]
    return cell


def _notebook(cells: list) -> nbformat.NotebookNode:
    metadata = {"kernelspec": _KERNELSPEC, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def write_kernel() -> Path:
    """Write kaggle_kernel.ipynb; raises BundleError where Kaggle would not take it."""
    return _write(build_kernel(), KERNEL)


def write_single(number: str) -> Path:
    """Write bundles/NN_….ipynb; raises BundleError."""
    return _write(build_single(number), SINGLES / f"{find_stage(number).name}.ipynb")


def _write(notebook: nbformat.NotebookNode, path: Path) -> Path:
    size = len(json.dumps(notebook))  # as the Kaggle CLI counts: re-serialised in ASCII
    if size > MAXIMUM_BYTES:
        raise BundleError(f"{path.name} has {size:,} bytes; Kaggle takes less than {MAXIMUM_BYTES:,}.")
    write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return path


def check_kernel() -> None:
    """Raise BundleError unless kaggle_kernel.ipynb carries the files as they are now, and its cells are the generated ones.

    The archive is compared by the files' own digest: zlib may pack the same bytes differently elsewhere.
    """
    if not KERNEL.exists():
        raise BundleError(f"{KERNEL.name} is missing; run {BUNDLE_COMMAND}.")
    found, expected = nbformat.read(KERNEL, as_version=4), build_kernel()
    if [_essence(cell) for cell in found.cells] != [_essence(cell) for cell in expected.cells]:
        raise BundleError(f"{KERNEL.name} is out of date; run {BUNDLE_COMMAND} and commit it.")


def _essence(cell: nbformat.NotebookNode) -> str:
    """A cell's source, that of the archive by its files' digest."""
    digest = re.search(r'(?m)^CONTENT = "([0-9a-f]{64})"$', cell.source)
    return digest[1] if digest else cell.source


def content_digest(files: list[Path]) -> str:
    """sha256 over names and contents."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def with_parameters(notebook: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The notebook (as plain JSON) with other literals in its parameters cell; raises BundleError where it has none."""
    notebook = json.loads(json.dumps(notebook))
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise BundleError(f"{KERNEL.name} has {len(tagged)} parameters cells, expected one; run {BUNDLE_COMMAND}.")
    source = "".join(tagged[0]["source"])
    for name, value in values.items():
        source, count = re.subn(rf"(?m)^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", source)
        if count != 1:
            raise BundleError(f"{KERNEL.name} has no parameter {name}; run {BUNDLE_COMMAND}.")
    tagged[0]["source"] = source
    return notebook
