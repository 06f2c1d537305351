"""The series in one self-contained notebook, a zip in one of its cells, for Kaggle's push and for Colab."""

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

from utils.errors import ServiceError
from utils.files import write_text
from utils.pipeline.stages import find_stage
from utils.project import NAME, ROOT

KERNEL = ROOT / "kaggle_kernel.ipynb"
SINGLES = ROOT / "bundles"
MAXIMUM_BYTES = 900_000  # Kaggle refuses a source of 1 MB with a bare "400 Client Error"
_PATTERNS = ("utils/**/*.py", "utils/data/*.yaml", "utils/report/templates/*", "notebooks/*.ipynb", "notebooks/profiles/*.yaml",
             "requirements.txt")  # fmt: skip
_EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed date: the same files give the same archive
TEMPLATE = Path(__file__).with_name("kernel.ipynb")  # the kernel's cells; what stands between two @ is filled in
# A single notebook's cells: ask for Drive on Colab, install what the image lacks, resume an earlier output.
SINGLE_PREPARE = "from utils.project import prepare\n\nprepare(drive=True)"
SINGLE_RESUME = "from utils.kaggle import resume_from_attached\n\nRUN_DIR = str(resume_from_attached(PROFILE, RUN_DIR))"


def bundled_files() -> list[Path]:
    """What travels: the package, the notebooks with their profiles, the pins."""
    return sorted(path for pattern in _PATTERNS for path in ROOT.glob(pattern) if path.is_file())


def build_kernel(profile: str = "auto", overrides: Mapping[str, Any] | None = None) -> nbformat.NotebookNode:
    """The kernel notebook, the same for the same files; raises ServiceError where Kaggle would not take it."""
    notebook = nbformat.read(TEMPLATE, as_version=4)
    _, parameters, materialise, *_ = notebook.cells
    if profile != "auto":
        parameters.source = re.sub("(?m)^PROFILE = .*$", f"PROFILE = {profile!r}", parameters.source)
    if overrides:
        line = f"OVERRIDES = {dict(overrides)!r}"
        parameters.source = re.sub("(?m)^OVERRIDES = .*$", lambda _: line, parameters.source)
    materialise.source = _materialise(materialise.source)
    return _checked(notebook)


def build_single(number: str) -> nbformat.NotebookNode:
    """One numbered notebook, whose bootstrap cell unpacks the package; UserError for another number."""
    stage = find_stage(number)
    notebook, template = (nbformat.read(path, as_version=4) for path in (stage.notebook, TEMPLATE))
    cells = notebook.cells
    bootstrap, parameters = [cell for cell in cells if cell.cell_type == "code"][:2]
    bootstrap.source = f"{_materialise(template.cells[2].source)}\n\n{SINGLE_PREPARE}"
    attached = nbformat.v4.new_code_cell(SINGLE_RESUME, id=f"{stage.number}-attached")
    cells.insert(cells.index(parameters) + 1, attached)
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
        raise ServiceError(f"The notebook has {size:,} bytes; Kaggle takes less than {MAXIMUM_BYTES:,}.")
    return notebook


def write_bundle(number: str = "") -> Path:
    """Write kaggle_kernel.ipynb, or bundles/NN_….ipynb; raises as `build_kernel` and `build_single`."""
    notebook = build_single(number) if number else build_kernel()
    path = SINGLES / f"{find_stage(number).name}.ipynb" if number else KERNEL
    return write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def check_kernel() -> None:
    """Raise ServiceError unless kaggle_kernel.ipynb is what these files give, however zlib packed them."""
    if not KERNEL.exists():
        raise ServiceError(f"{KERNEL.name} is missing; run python -m utils bundle.")
    found, expected = nbformat.read(KERNEL, as_version=4), build_kernel()
    if [_essence(cell) for cell in found.cells] != [_essence(cell) for cell in expected.cells]:
        raise ServiceError(f"{KERNEL.name} is out of date; run python -m utils bundle and commit it.")


def _essence(cell: nbformat.NotebookNode) -> str:
    """A cell's source, that of the archive by its files' digest."""
    digest = re.search(r'(?m)^CONTENT = "([0-9a-f]{64})"$', cell.source)
    return digest[1] if digest else cell.source
