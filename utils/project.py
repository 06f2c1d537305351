"""Where this project lives: names, folders and the repository's address, each in exactly one place."""

import hashlib
import importlib.metadata
import os
import shlex
import sys
from pathlib import Path

NAME = "deepseek-r1-medical-lora"
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
KAGGLE = Path("/kaggle")  # where Kaggle mounts input and working
DRIVE = Path("/content/drive/MyDrive")  # the reader's own files, once Colab has mounted Google Drive

# "owner/name" on GitHub, and the tag that a notebook opened alone clones. `make address REPOSITORY=you/fork` writes
# yours here, into the notebooks' first cells and into the README; while it starts with OWNER/, nothing is cloned.
REPOSITORY = "OWNER/deepseek-r1-medical-lora"
REF = "v0.2.0"


def prepare(restart: bool = True, drive: bool = False) -> None:
    """What a notebook's bootstrap cell calls: ImportError where `utils` is another package, else `install_missing`.

    With `drive`, Colab asks for Google Drive first: each notebook has a machine of its own there.
    """
    import utils

    if getattr(utils, "SERIES", None) != NAME:
        raise ImportError(f"Another package named utils came first ({utils.__file__}): restart the kernel.")
    from utils.hardware import where
    from utils.pins import install_missing

    if drive and where() == "colab":
        mount_drive()
    install_missing(restart)


def mount_drive() -> None:
    """Ask for Google Drive, where `runs_dir` then is; without it, one sentence says what will not be found."""
    from utils.processes import is_executed

    if is_executed():  # nobody is there to answer, and Colab's question waits without end
        return
    try:
        from google.colab import drive

        drive.mount(str(DRIVE.parent))
    except Exception as error:  # refused, forbidden by the account, timed out: Colab has a type for each
        lost = "this run directory ends with this machine, and the next notebook, on another one, will not find it"
        instead = "Run this cell again and allow Drive, or take kaggle_kernel.ipynb, the whole series on one machine."
        print(f"Google Drive is not mounted ({type(error).__name__}): {lost}. {instead}")


def command(*words: str | Path) -> str:
    """How this command line is called from here with `words`: a line that it prints must run when it is pasted."""
    python = Path(sys.executable)
    short = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return shlex.join(map(str, (short, "-m", "utils", *words)))


def python_path() -> str:
    """PYTHONPATH for a process of ours: this checkout first, then what was there."""
    return os.pathsep.join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


def cache_dir() -> Path:
    """Where models built or fetched here are kept: below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME


def runs_dir() -> Path:
    """Where run directories go by default: where Kaggle saves from, on Drive where it is mounted, or in the checkout."""
    if (working := KAGGLE / "working").is_dir():
        return working / "runs"
    return (DRIVE / NAME if DRIVE.is_dir() else ROOT) / "runs"


def source_digest() -> str:
    """sha256 over the package's sources: the manifest says which code made a result."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def embedded_fingerprint() -> str:
    """Twelve hex digits that name the embedded model's recipe, its data and the torch that trains it."""
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    for name in ("models/tiny.py", "data/synthetic.py", "data/clinic.yaml", "data/prompts.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:12]
