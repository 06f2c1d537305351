"""A disk that somebody else fills: `python -m tests.faults.full_disk PLACE OUT LAST STAGE …`, where one may mount.

On a tmpfs at PLACE the series runs; at a random moment of each STAGE all space that is left is taken, until it fails;
then the space is given back and the same command goes on. Copies the run to OUT/run, prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from tests.faults.series_process import SeriesProcess

SIZE = 220 << 20  # bytes: the series asks for 0.1 GiB of free space at each stage's beginning
SECONDS = {"00": 1.0, "01": 4.0, "02": 3.0, "03": 8.0, "04": 8.0, "05": 8.0}  # of a stage, in which to fill the disk


def take_all(ballast: Path) -> None:
    """Fill the file system to its last page."""
    with ballast.open("wb") as stream:
        size = 1 << 24
        while size >= 512:
            try:
                os.posix_fallocate(stream.fileno(), os.fstat(stream.fileno()).st_size, size)
            except OSError:
                size //= 2


def main(place: Path, out: Path, last: str, stages: list[str]) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], check=True)
    random_moment, failures = random.Random("full disk"), []
    for stage in stages:
        series = SeriesProcess(place / "run", "--to", last)
        at_work = series.wait_until(stage, random_moment.uniform(0, SECONDS[stage]))
        take_all(place / "ballast")
        status = series.wait()
        (place / "ballast").unlink()
        failures.append({"stage": stage, "at_work": at_work, "status": status, "output": series.output})
    end = SeriesProcess(place / "run", "--to", last)
    status = end.wait()
    shutil.copytree(place / "run", out / "run")
    print(json.dumps({"failures": failures, "status": status, "output": end.output}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
