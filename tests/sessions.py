"""A session of Kaggle's or Colab's on this machine: its folders, its variables, an empty HOME, no checkout, no network."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.loopback import DEAD, KaggleServer

_SETUP = 'ip link set lo up && mkdir -p "$1" && mount --bind "$0" "$1" && shift && exec "$@"'
_PLACES = ("/kaggle", "/content")


def isolated(folder: Path, *command: str | Path, place: str = "/kaggle") -> list[str]:
    """`command` with a network (127.0.0.1 alone), processes and a `place` of its own, which is the folder `folder`.

    As there, the session's first process is the machine's. Skips the test where the system does not allow it.
    """
    inside = [
        "flock",
        "--shared",
        "/",
        "unshare",
        "-rnpm",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
        _SETUP,
    ]
    if not _is_allowed(tuple(inside)):
        pytest.skip("no unshare or ip here, or it is not allowed: a session cannot be shut off from this machine")
    return [*inside, *map(str, (folder, place, *command))]


@cache
def _is_allowed(inside: tuple[str, ...]) -> bool:
    try:
        return subprocess.run([*inside, "/tmp", "/kaggle", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
    finally:
        leave_no_trace()


def leave_no_trace() -> None:
    """Remove the machine's /kaggle and /content, but never below another session's mount: removing a mount point detaches it everywhere."""
    machine = os.open("/", os.O_RDONLY)
    with contextlib.suppress(OSError):  # in use by another session, or not empty: no trace of ours
        fcntl.flock(machine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for place in _PLACES:
            with contextlib.suppress(FileNotFoundError):
                Path(place).rmdir()
    os.close(machine)


class Machine:
    """One Kaggle session's machine below `root`; `model` is the embedded base model, so that it is not built again."""

    def __init__(self, root: Path, model: Path, variables: dict[str, str] | None = None):
        self.root, self.empty, self.kaggle = root, root / "empty", root / "kaggle"
        for name in ("home", "empty", "tmp", "kaggle/working", "kaggle/input"):
            (root / name).mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL")}
        self.environment = kept | (variables or {}) | {
            "HOME": str(root / "home"), "TMPDIR": str(root / "tmp"), "XDG_CACHE_HOME": str(model.parent.parent),
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "HTTP_PROXY": DEAD, "HTTPS_PROXY": DEAD, "http_proxy": DEAD, "https_proxy": DEAD,
        }  # fmt: skip
        self.environment.pop("PYTHONPATH", None)  # a new machine's: it knows no checkout

    @property
    def working(self) -> Path:
        return self.kaggle / "working"

    def attach(self, files: dict[str, bytes], place: str) -> None:
        """An output among the inputs, read-only."""
        for name, content in files.items():
            path = self.kaggle / "input" / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o444)

    def execute(self, text: str) -> subprocess.CompletedProcess:
        """The notebook by papermill, as Kaggle runs it."""
        (self.empty / "kernel.ipynb").write_text(text)
        papermill = (sys.executable, "-m", "papermill", "--log-output", "kernel.ipynb", "__notebook__.ipynb")
        command = isolated(self.kaggle, *papermill)
        try:
            return subprocess.run(
                command, cwd=self.empty, env=self.environment, capture_output=True, text=True, check=False, timeout=900
            )
        finally:
            leave_no_trace()

    def hand_output_to(self, server: KaggleServer, session: subprocess.CompletedProcess) -> None:
        """What lies in /kaggle/working becomes the output of the server's kernel, with log and status."""
        server.files = read_files(self.working)
        server.log = json.dumps([{"stream_name": "stderr", "time": 1.0, "data": session.stdout + session.stderr}])
        server.statuses = [{"status": "running"}, {"status": "complete" if session.returncode == 0 else "error"}]


_RUN_BY_HAND = """
import sys, nbclient, nbformat
notebook = nbformat.reads(sys.stdin.read(), as_version=4)
try:
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=None, startup_timeout=600).execute(cwd="/content")
finally:
    nbformat.write(notebook, "/content/executed.json")
"""


class Colab:
    """The machine that Colab gives to one notebook, below `root`: nothing of it is kept but what lies on `drive`.

    `python` is its environment's, `variables` are added to its own. Without `drive` the reader refuses to mount it.
    """

    def __init__(self, root: Path, drive: Path | None, python: str = sys.executable, **variables: str):
        self.content = root / "content"
        for name in ("home", "tmp", "content"):
            (root / name).mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL")}
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), DEAD)
        standin = {"PYTHONPATH": str(Path(__file__).parent / "colab_standin")}
        standin |= {"STANDIN_DRIVE": str(drive)} if drive else {}
        places = {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        self.environment, self.python = kept | proxies | standin | places | variables, python

    def start(self, text: str) -> subprocess.Popen:
        """The notebook's cells, run one by one as by a reader: no papermill, no driver."""
        (self.content.parent / "notebook").write_text(text)
        command = isolated(self.content, self.python, "-c", _RUN_BY_HAND, place="/content")
        with (self.content.parent / "notebook").open() as notebook, (self.content.parent / "log").open("w") as log:
            return subprocess.Popen(
                command, stdin=notebook, stdout=log, stderr=subprocess.STDOUT, cwd=self.content, env=self.environment
            )

    def execute(self, text: str) -> str:
        """All that its cells printed, once the notebook has come to its end."""
        try:
            assert self.start(text).wait(900) == 0, (self.content.parent / "log").read_text()[-3000:]
        finally:
            leave_no_trace()
        outputs = (o for c in self.executed["cells"] for o in c.get("outputs", []) if o["output_type"] == "stream")
        return "".join("".join(output["text"]) for output in outputs)

    @property
    def executed(self) -> dict:
        return json.loads((self.content / "executed.json").read_text(encoding="utf-8"))


def read_files(folder: Path) -> dict[str, bytes]:
    """{path below `folder`: content} of every file there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
