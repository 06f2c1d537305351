"""The driver's one line for the stage at work: how long it has been, and how far the kernel says it is."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from utils.pipeline.stages import Stage


class LiveLine:
    """One line for a stage: redrawn on a terminal, printed at start and end elsewhere."""

    def __init__(self, console: Console, stage: Stage, file: Path):
        self.console, self.stage, self.file = console, stage, file
        self._stop = threading.Event()

    def __enter__(self) -> LiveLine:
        self.started = time.monotonic()
        self._status = self.console.status(self._text()) if self.console.is_terminal else None
        if self._status:
            self._status.start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self._stop.set()
        self._thread.join()
        if self._status:
            self._status.stop()
        mark = "[red]✗[/red]" if kind else "[green]✓[/green]"
        spent = time.monotonic() - self.started
        self.console.print(f"{mark} {self.stage.number} {self.stage.title}  [dim]{spent:.0f} s[/dim]", highlight=False)

    def _text(self) -> str:
        text = f"{self.stage.number} {self.stage.title}  [dim]{time.monotonic() - self.started:.0f} s[/dim]"
        try:
            state = json.loads(self.file.read_text())
            share = f"{state['done']}/{state['total']}"
            text += f"  {escape(state['description'])} {share}  [dim]{escape(str(state['note']))}[/dim]"
        except (OSError, ValueError):
            pass  # the kernel is still importing
        return text

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(0.25):
            if self._status:
                self._status.update(self._text())
            elif time.monotonic() - last > 30:  # a log file gets a line every half minute, not a spinner
                last = time.monotonic()
                self.console.print("  " + self._text(), highlight=False)
