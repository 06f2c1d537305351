"""What a disk refuses, told in one sentence."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import HardwareError, RunDirError, UserError
from utils.platforms import free_disk_gib

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# Libraries that write without Python tell the number in words, and torch's writer tells nothing but that it failed.
_NUMBER = re.compile(r"\[?(?:Errno|os error) (\d+)\b")
_TORCH = re.compile(r"PytorchStreamWriter failed|inline_container\.cc|iostream error")


@contextmanager
def writing(target: Path, needed_gib: float = 0.1) -> Iterator[None]:
    """Around what writes `target`, of `needed_gib`: raises HardwareError where the disk is full, else RunDirError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise HardwareError(
                f"The disk filled up: {target.name} needs {needed_gib:.1f} GiB at {target.parent}, and "
                f"{free_disk_gib(target):.1f} GiB are free now; free some space and run 05 again."
            ) from None
        raise RunDirError(
            f"{target} could not be written ({error.strerror or error}); choose a --run-dir that can be."
        ) from None


def disk_error(error: BaseException, run_dir: Path) -> UserError | None:
    """The user's error where `error`, of whatever library, says that a disk refused to be written; None elsewhere."""
    if isinstance(error, UserError):
        return None
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1])
    place = Path(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str) else run_dir
    if number in _FULL or _TORCH.search(str(error)):
        why = os.strerror(number) if number else "torch could not write a file"
        return HardwareError(
            f"The disk is full ({why}): {free_disk_gib(place):.2f} GiB are free at {place}; free some space and "
            "run the same again, what was saved stays and is gone on with."
        )
    if number in _REFUSED:
        return RunDirError(
            f"{place} cannot be written ({os.strerror(number)}); make it writable, or continue a copy of {run_dir} elsewhere."
        )
    return None


def tell_disk_errors(run_dir: Path) -> None:
    """From here on this notebook, if it is one, shows a refused write as its sentence, not as a stack."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return

    def show(shell, kind, value, traceback, tb_offset=None):
        told = disk_error(value, run_dir)
        if told is None:
            shell.showtraceback((kind, value, traceback), tb_offset=tb_offset)
        else:
            shell._showtraceback(type(told), told, told._render_traceback_())

    shell.set_custom_exc((Exception,), show)
