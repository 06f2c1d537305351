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
from utils.pipeline.stages import find_stage
from utils.project import NAME, ROOT

KERNEL = ROOT / "kaggle_kernel.ipynb"
SINGLES = ROOT / "bundles"
MAXIMUM_BYTES = 900_000  # Kaggle refuses a source of 1 MB with a bare "400 Client Error"
_PATTERNS = ("utils/**/*.py", "utils/report/templates/*", "notebooks/*.ipynb", "notebooks/profiles/*.yaml",
             "requirements.txt")  # fmt: skip
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed date: the same files give the same archive
TEMPLATE = Path(__file__).with_name("kernel.ipynb")  # the kernel's cells; what stands between two @ is filled in
SINGLE_PREPARE = """
from utils.project import prepare

prepare()  # on Kaggle and Colab only: what the pins ask for and the image lacks
"""
SINGLE_RESUME = """
from utils.kaggle import resume_from_attached

RUN_DIR = str(resume_from_attached(PROFILE, RUN_DIR))  # the earlier notebooks' output, where one is attached
"""
SINGLE_END = """
from utils.kaggle import move_large_files

move_large_files(RUN_DIR)  # on Kaggle only: light results stay in this notebook's output
"""


class BundleError(UserError):
    """The generated kernel notebook is missing, out of date, or too large to push."""


def bundled_files() -> list[Path]:
    """What travels: the package, the notebooks with their profiles, the pins."""
    return sorted(path for pattern in _PATTERNS for path in ROOT.glob(pattern) if path.is_file())


def build_kernel(profile: str = "auto", overrides: Mapping[str, Any] | None = None) -> nbformat.NotebookNode:
    """The kernel notebook, the same for the same files; raises BundleError where Kaggle would not take it."""
    notebook = nbformat.read(TEMPLATE, as_version=4)
    _, parameters, materialise, *_ = notebook.cells
    for name, value in (("PROFILE", profile), ("OVERRIDES", dict(overrides or {}))):
        if value not in ("auto", {}):
            parameters.source = re.sub(
                rf"(?m)^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", parameters.source
            )
    materialise.source = _materialise(materialise.source)
    return _checked(notebook)


def build_single(number: str) -> nbformat.NotebookNode:
    """One numbered notebook with the package inside: its bootstrap cell unpacks instead of looking around.

    Raises BundleError for a number that there is not.
    """
    try:
        stage = find_stage(number)
    except (KeyError, ValueError):
        raise BundleError(f"There is no notebook {number!r}; there are 00 to 05.") from None
    notebook, cells = nbformat.read(stage.notebook, as_version=4), []
    template = nbformat.read(TEMPLATE, as_version=4).cells[2].source
    bootstrap, parameters = [cell for cell in notebook.cells if cell.cell_type == "code"][:2]
    bootstrap.source = f"{_materialise(template)}\n{SINGLE_PREPARE.rstrip()}"
    for cell in notebook.cells:
        if cell is notebook.cells[-1]:
            cells.append(nbformat.v4.new_code_cell(SINGLE_END.strip(), id=f"{stage.number}-output"))
        cells.append(cell)
        if cell is parameters:
            cells.append(nbformat.v4.new_code_cell(SINGLE_RESUME.strip(), id=f"{stage.number}-attached"))
    return _checked(nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata))


def _materialise(template: str) -> str:
    """The source of the cell that carries the archive, with its listing and checksums."""
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in bundled_files()}
    archive, content = io.BytesIO(), hashlib.sha256()
    with zipfile.ZipFile(archive, "w") as bundle:
        for name, data in files.items():
            bundle.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
            content.update(name.encode() + b"\0" + data + b"\0")
    fields = {
        "LISTING": "\n#   ".join(f"{name} ({len(data):,} bytes)" for name, data in files.items()),
        "DIGEST": content.hexdigest(),
        "ARCHIVE": "\n".join(textwrap.wrap(base64.b64encode(archive.getvalue()).decode(), 120)),
        "CHECKSUM": hashlib.sha256(archive.getvalue()).hexdigest(),
        "NAME": NAME,
    }
    return re.sub("@([A-Z]+)@", lambda field: fields[field[1]], template)


def _checked(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    size = len(json.dumps(notebook))  # as the Kaggle package counts: serialised in ASCII
    if size >= MAXIMUM_BYTES:
        raise BundleError(f"The notebook has {size:,} bytes; Kaggle takes less than {MAXIMUM_BYTES:,}.")
    return notebook


def write_kernel() -> Path:
    """Write kaggle_kernel.ipynb; raises BundleError where Kaggle would not take it."""
    return _write(build_kernel(), KERNEL)


def write_single(number: str) -> Path:
    """Write bundles/NN_….ipynb; raises BundleError."""
    return _write(build_single(number), SINGLES / f"{find_stage(number).name}.ipynb")


def _write(notebook: nbformat.NotebookNode, path: Path) -> Path:
    write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return path


def check_kernel() -> None:
    """Raise BundleError unless kaggle_kernel.ipynb is what these files give.

    The archive is compared by the files' own digest: zlib may pack the same bytes differently elsewhere.
    """
    if not KERNEL.exists():
        raise BundleError(f"{KERNEL.name} is missing; run python -m utils bundle.")
    found, expected = nbformat.read(KERNEL, as_version=4), build_kernel()
    if [_essence(cell) for cell in found.cells] != [_essence(cell) for cell in expected.cells]:
        raise BundleError(f"{KERNEL.name} is out of date; run python -m utils bundle and commit it.")


def _essence(cell: nbformat.NotebookNode) -> str:
    """A cell's source, that of the archive by its files' digest."""
    digest = re.search(r'(?m)^CONTENT = "([0-9a-f]{64})"$', cell.source)
    return digest[1] if digest else cell.source
