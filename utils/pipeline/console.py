"""What the driver shows: one line for the stage at work, and in the end what was written and what comes next."""

from __future__ import annotations

import json
import threading
import time

from rich.console import Console
from rich.markup import escape

from utils.pipeline.run_dir import RunDir
from utils.pipeline.stages import Stage
from utils.progress import FILE
from utils.project import command

_RESULTS = {
    "report/index.html": "open it in a browser; it needs no network",
    "comparison/metrics.json": "the numbers behind it",
    "export/adapter": "load it with peft on the base model",
    "export/merged": "load it with transformers",
}


class LiveLine:
    """How long a stage has been at work, and how far it is: redrawn on a terminal, else now and then."""

    def __init__(self, console: Console, stage: Stage, run: RunDir):
        self.console, self.stage, self.file = console, stage, run.file(FILE)
        self.started, self._stop = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> LiveLine:
        self.file.write_text("{}")  # the kernel writes where this lies
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.file.unlink(missing_ok=True)
        show(self.console, f"{'[red]✗[/red]' if kind else '[green]✓[/green]'} {self._heading()}")

    def _heading(self) -> str:
        return f"{self.stage.number} {self.stage.title}  [dim]{time.monotonic() - self.started:.0f} s[/dim]"

    def _text(self) -> str:
        try:
            at = json.loads(self.file.read_text())
            done = f"{at['description']} {at['done']}/{at['total']}"
            return f"{self._heading()}  {escape(done)}  [dim]{escape(str(at['note']))}[/dim]"
        except (OSError, ValueError, KeyError):  # the kernel is still importing
            return self._heading()

    def _watch(self) -> None:
        if self.console.is_terminal:
            with self.console.status(self._text()) as status:
                while not self._stop.wait(0.25):
                    status.update(self._text())
        while not self._stop.wait(30):  # a log file gets a line every half minute, not a spinner
            show(self.console, "  " + self._text())


def show(console: Console, markup: str) -> None:
    """A line that is not broken, and in which nothing is coloured that we did not colour."""
    console.print(markup, highlight=False, soft_wrap=True)


def summarise(run: RunDir, console: Console, seconds: float, sentence: str = "", stale: str | None = None) -> None:
    """What was written, the verdict's `sentence`, and what to do next; `stale` is why it is out of date."""
    series = command("run", "--run-dir", run.path)
    console.print()
    if stale:
        text = f"The verdict on file is of an earlier run ({stale}); {series} brings it up to date. It was:"
        show(console, f"[yellow]{escape(text)}[/yellow]")
    if sentence:
        console.print(sentence, style=None if stale else "bold", highlight=False, markup=False)
    for name, hint in _RESULTS.items():
        if run.file(name).exists():
            show(console, f"  {escape(str(run.file(name)))}  [dim]{hint}[/dim]")
    if run.file("export/adapter").exists() and not stale:
        upload = command("publish", run.path, "--repo", "USER/NAME")
        show(console, f"[dim]To upload it, where your tokens are:\n  {escape(upload)}[/dim]")
    text = f"{seconds:.0f} s. Next: change a setting; only what depends on it runs again:\n  {series} --set KEY=VALUE"
    show(console, f"[dim]{escape(text)}[/dim]")
