"""A stand-in for google.colab.drive: the reader's Drive is the folder $STANDIN_DRIVE.

Written from what googlecolab/colabtools' drive.py does: a second call says so and returns, and where the reader refuses,
the answer to its question is an error. Mounting needs the rights that tests/sessions.py gives.
"""

import os
import subprocess
from pathlib import Path


class MessageError(Exception):
    pass


def mount(mountpoint: str, force_remount: bool = False, timeout_ms: int = 120_000, readonly: bool = False) -> None:
    if "STANDIN_DRIVE" not in os.environ:
        raise MessageError("Error: credential propagation was unsuccessful")
    files = Path(mountpoint, "MyDrive")
    if files.is_dir() and not force_remount:
        print(f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call drive.mount again.")
        return
    files.mkdir(parents=True)
    subprocess.run(["mount", "--bind", os.environ["STANDIN_DRIVE"], str(files)], check=True)
    print(f"Mounted at {mountpoint}")
