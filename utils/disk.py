"""What a disk refuses, told in one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import HardwareError, RunDirError
from utils.platforms import free_disk_gib


@contextmanager
def writing(target: Path, needed_gib: float = 0.1) -> Iterator[None]:
    """Around what writes `target`, of `needed_gib`: raises HardwareError where the disk is full, else RunDirError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HardwareError(
                f"The disk filled up: {target.name} needs {needed_gib:.1f} GiB at {target.parent}, and "
                f"{free_disk_gib(target):.1f} GiB are free now; free some space and run 05 again."
            ) from None
        raise RunDirError(
            f"{target} could not be written ({error.strerror or error}); choose a --run-dir that can be."
        ) from None
