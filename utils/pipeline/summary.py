"""What the driver says at the end of a run."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from utils.errors import RunDirError
from utils.evaluation.results import read_sentence
from utils.pipeline.run_dir import RunDir
from utils.project import command
from utils.report.index import stale_comparison


def summarise(run: RunDir, console: Console, seconds: float) -> None:
    """What was written, what it showed, what to do next."""
    metrics = run.file("comparison/metrics.json")
    console.print()
    stale = stale_comparison(run) if metrics.exists() else None
    if stale:
        again = f"{command()} run --run-dir {run.path}"
        told = f"The verdict on file is of an earlier run ({stale}); {again} brings it up to date. It was:"
        console.print(told, style="yellow", highlight=False, soft_wrap=True, markup=False)
    if metrics.exists():
        try:
            console.print(read_sentence(run.path), style=None if stale else "bold", highlight=False, markup=False)
        except RunDirError as error:  # of a stage that was not asked for
            console.print(str(error), style="yellow", highlight=False, markup=False)
    rows = [
        ("report", "report/index.html", "open it in a browser; it needs no network"),
        ("figures", "comparison/metrics.json", "the numbers behind it"),
        ("adapter", "export/adapter", "load it with peft on the base model"),
        ("merged", "export/merged", "load it with transformers"),
    ]
    for name, path, hint in rows:
        if run.file(path).exists():
            console.print(
                f"  {name:<8} {escape(str(run.file(path)))}  [dim]{hint}[/dim]", highlight=False, soft_wrap=True
            )
    if run.file("export/adapter").exists() and not stale:
        upload = f"{command()} publish {run.path} --repo USER/NAME"
        console.print(
            f"[dim]To upload it, where your tokens are:\n  {escape(upload)}[/dim]", highlight=False, soft_wrap=True
        )
    again = f"{command()} run --profile {run.config.profile} --run-dir {run.path} --set KEY=VALUE"
    console.print(f"[dim]{seconds:.0f} s. Next: change a setting and only what depends on it runs again:\n  {escape(again)}[/dim]",
                  highlight=False, soft_wrap=True)  # fmt: skip
