"""What the driver shows: one line for the stage at work, and in the end what was written and what comes next."""

import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from utils.errors import RunDirError
from utils.files import read_json
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


def make_console(stderr: bool = False) -> Console:
    """One that prints lines as they are: unbroken, without markup, and coloured only where we say so."""
    # A kernel sets FORCE_COLOR, which rich takes for a terminal: a log would get thousands of redrawn lines.
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, force_terminal=terminal, highlight=False, soft_wrap=True, markup=False)


class LiveLine:
    """How long a stage has been at work, and how far it is: redrawn on a terminal, else now and then."""

    def __init__(self, console: Console, stage: Stage, run: RunDir):
        self.console, self.stage, self.file = console, stage, run.file(FILE)
        self.started, self._stop = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "LiveLine":
        self.file.write_text("{}")  # the kernel writes where this lies
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.file.unlink(missing_ok=True)
        self.console.print(Text.assemble(("✗", "red") if kind else ("✓", "green"), " ", self._heading()))

    def _heading(self) -> Text:
        seconds = f"{time.monotonic() - self.started:.0f} s"
        return Text.assemble(f"{self.stage.number} {self.stage.title}  ", (seconds, "dim"))

    def _text(self) -> Text:
        try:
            at = read_json(self.file)
            done = f"  {at['description']} {at['done']}/{at['total']}  "
            return Text.assemble(self._heading(), done, (str(at["note"]), "dim"))
        except (OSError, ValueError, KeyError):  # the kernel is still importing
            return self._heading()

    def _watch(self) -> None:
        if self.console.is_terminal:
            with self.console.status(self._text()) as status:
                while not self._stop.wait(0.25):
                    status.update(self._text())
        while not self._stop.wait(30):  # a log file gets a line every half minute, not a spinner
            self.console.print(Text.assemble("  ", self._text()))


def summarise(run: RunDir, console: Console, seconds: float, sentence: str = "", stale: str | None = None) -> None:
    """What was written, the verdict's `sentence`, and what to do next; `stale` is why it is out of date."""
    series = command("run", "--run-dir", run.path)
    console.print()
    if stale:
        text = f"The verdict on file is of an earlier run ({stale}); {series} brings it up to date. It was:"
        console.print(text, style="yellow")
    if sentence:
        console.print(sentence, style=None if stale else "bold")
    for name, hint in _RESULTS.items():
        if run.file(name).exists():
            console.print(Text.assemble(f"  {run.file(name)}  ", (hint, "dim")))
    if run.file("export/adapter").exists() and not stale:
        upload = command("publish", run.path, "--repo", "USER/NAME")
        console.print(f"To upload it, where your tokens are:\n  {upload}", style="dim")
    text = f"{seconds:.0f} s. Next: change a setting; only what depends on it runs again:\n  {series} --set KEY=VALUE"
    console.print(text, style="dim")


def read_sentence(run_dir: Path) -> str:
    """The verdict's sentence in comparison/metrics.json; raises RunDirError where that file is not what 04 writes."""
    file = run_dir / "comparison" / "metrics.json"
    try:
        return str(read_json(file)["sentence"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = "it holds no sentence" if isinstance(error, (LookupError, TypeError)) else error
        raise RunDirError(f"{file} cannot be read ({reason}); run 04_comparison again, which writes it.") from None
