"""Progress for everything that takes longer than two seconds: a bar in the notebook, one live line in `run`."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
FILE = ".progress.json"  # in the run directory where a driver watches; the stage at work writes its step there
_INTERVAL_S = 0.5
_FORECAST_AFTER_S, _WORTH_A_FORECAST_S = 30.0, 60.0  # what is over within a minute needs none
_file: Path | None = None


def report_to(run_dir: Path) -> None:
    """From here on this process writes its progress into the run directory, where a driver watches it."""
    global _file
    _file = run_dir / FILE if (run_dir / FILE).exists() else None


class Progress(AbstractContextManager):
    """A bar of `total` units, as a context manager; `update` moves it."""

    def __init__(self, description: str, total: int, unit: str = "it"):
        self.description, self.total, self.done, self.note = description, total, 0, ""
        self._last, self._began, self._foretold = 0.0, time.monotonic(), False
        # stdout: a notebook paints stderr red. One second: each redraw is a message to the browser.
        self._bar = tqdm(total=total, desc=description, unit=unit, file=sys.stdout, mininterval=1.0, ncols=96)

    def update(self, step: int = 1, note: str = "") -> None:
        """Advance by `step` units; `note` is a short text such as the current loss."""
        self.done += step
        if note:
            self.note = note
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(step)
        if _file is None or (time.monotonic() - self._last < _INTERVAL_S and self.done < self.total):
            return
        self._last = time.monotonic()
        state = {"description": self.description, "done": self.done, "total": self.total, "note": self.note}
        scratch = _file.with_suffix(".tmp")
        with suppress(OSError):  # a full disk is no reason to stop what is at work
            scratch.write_text(json.dumps(state))
            scratch.replace(_file)

    def forecast(self, left_s: float, of_what: str) -> None:
        """Say once how long the rest will take: not before half a minute, and not of what is over within a minute."""
        passed = time.monotonic() - self._began
        if not self._foretold and passed >= _FORECAST_AFTER_S and left_s >= _WORTH_A_FORECAST_S:
            self._bar.write(f"Forecast: about {show_duration(left_s)} more for {of_what}", file=sys.stdout)
            self._foretold = True

    def close(self) -> None:
        self._bar.close()

    def __exit__(self, *_) -> None:
        self.close()


def track(items: Iterable[Item], description: str, unit: str = "it") -> Iterator[Item]:
    """Yield `items` (with a length) and show how far along they are."""
    items = items if hasattr(items, "__len__") else list(items)
    with Progress(description, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()


def show_duration(seconds: float) -> str:
    """`85 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def notebook_shell() -> Any:
    """IPython's shell, where this process has one; None in a plain one."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module is not None else None
