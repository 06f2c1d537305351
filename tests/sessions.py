"""A Kaggle session on this machine: its folders, its variables, an empty HOME, no repository and no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.loopback import DEAD, KaggleServer
from utils.project import ROOT


def without_network(*command: str | Path) -> list[str]:
    """`command` in a network of its own with nothing but 127.0.0.1, where the system lets us; as it is elsewhere."""
    words = [str(word) for word in command]
    if shutil.which("unshare") and shutil.which("ip"):
        inside = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode == 0:
            return [*inside, *words]
    return words


class Machine:
    """One session's machine below `root`; `model` is the embedded base model, so that it is not built again."""

    def __init__(self, root: Path, model: Path, variables: dict[str, str] | None = None):
        self.root, self.empty, self.kaggle = root, root / "empty", root / "kaggle"
        for name in ("home", "empty", "tmp", "kaggle/working", "kaggle/input"):
            (root / name).mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL")}
        self.environment = kept | (variables or {}) | {
            "HOME": str(root / "home"), "TMPDIR": str(root / "tmp"), "TEST_KAGGLE": str(self.kaggle),
            "XDG_CACHE_HOME": str(model.parent.parent), "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "HTTP_PROXY": DEAD, "HTTPS_PROXY": DEAD, "http_proxy": DEAD, "https_proxy": DEAD,
        }  # fmt: skip
        self.environment["PYTHONPATH"] = str(ROOT / "tests" / "session_site")  # a new machine's: it knows no checkout

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
        command = without_network(
            sys.executable, "-m", "papermill", "--log-output", "kernel.ipynb", "__notebook__.ipynb"
        )
        begun = self.environment | {"TEST_BEGUN": repr(time.time())}
        return subprocess.run(
            command, cwd=self.empty, env=begun, capture_output=True, text=True, check=False, timeout=900
        )

    def hand_output_to(self, server: KaggleServer, session: subprocess.CompletedProcess) -> None:
        """What lies in /kaggle/working becomes the output of the server's kernel, with log and status."""
        server.files = {
            p.relative_to(self.working).as_posix(): p.read_bytes() for p in self.working.rglob("*") if p.is_file()
        }
        server.log = json.dumps([{"stream_name": "stderr", "time": 1.0, "data": session.stdout + session.stderr}])
        server.statuses = [{"status": "running"}, {"status": "complete" if session.returncode == 0 else "error"}]
