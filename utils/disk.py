"""What a disk refuses, told in one sentence."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import HardwareError, RunDirError, UserError
from utils.hardware import free_disk_gib
from utils.notebook import notebook_shell

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)  # reading can meet them too, and a firewall
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
    named = isinstance(error, OSError) and isinstance(error.filename, str)
    place = Path(error.filename) if named else run_dir
    if number in _FULL or _TORCH.search(str(error)):
        why = os.strerror(number) if number else "torch could not write a file"
        return HardwareError(
            f"The disk is full ({why}): {free_disk_gib(place):.2f} GiB are free at {place}; free some space and "
            "run the same again, what was saved stays and is gone on with."
        )
    if number == errno.EROFS or (named and number in _REFUSED and _is_only_readable(place)):
        return RunDirError(
            f"{place} cannot be written ({os.strerror(number)}); make it writable, or continue a copy of {run_dir} elsewhere."
        )
    return None


def _is_only_readable(place: Path) -> bool:
    """Whether `place`, or the folder in which it would be made, can be read and not written: nothing refused to be read."""
    found = place if os.access(place, os.F_OK) else place.parent
    return os.access(found, os.R_OK) and not os.access(found, os.W_OK)


def tell_disk_errors(run_dir: Path) -> None:
    """From here on this notebook, if it is one, shows a refused write as its sentence, not as a stack."""
    shell = notebook_shell()
    if shell is None:
        return

    def show(shell, kind, value, traceback, tb_offset=None):
        told = disk_error(value, run_dir)
        if told is None:
            shell.showtraceback((kind, value, traceback), tb_offset=tb_offset)
        else:
            shell._showtraceback(type(told), told, told._render_traceback_())

    shell.set_custom_exc((Exception,), show)
