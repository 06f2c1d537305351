"""The command line: `python -m utils run | score | verify | bundle | push | collect | publish`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error.name} is not installed for {sys.executable}; run make demo, then .venv/bin/python -m utils."
    ) from None

from utils import remote
from utils.config import parse_overrides
from utils.errors import InfrastructureError, Interrupted, UserError
from utils.redaction import hide_secrets

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
# A kernel sets FORCE_COLOR, which rich takes for a terminal: a log would get thousands of redrawn lines.
console = Console(force_terminal=sys.stdout.isatty())
RunDirArgument = Annotated[Path, typer.Argument(help="A run directory, such as runs/demo.")]


@app.command()
def run(
    profile: Annotated[str, typer.Option(help="demo, tutorial, t4 or full; auto picks by the hardware.")] = "auto",
    run_dir: Annotated[str, typer.Option(help="Where everything is written; runs/PROFILE by default.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting, such as train.max_steps=10.")] = None,
    from_: Annotated[str, typer.Option("--from", help="First stage, 00 to 05.")] = "00",
    to: Annotated[str, typer.Option(help="Last stage, 00 to 05.")] = "05",
    fresh: Annotated[bool, typer.Option(help="Forget earlier --set values and run every stage again.")] = False,
) -> None:
    """Run the series: six notebooks in order, those that are unchanged left out, and a report at the end.

    Exits 0 when every stage passed, 1 when one failed, 4 when the session's time was up first (hardware.max_hours), 130
    and 143 when it was stopped by Ctrl-C or SIGTERM.
    """
    from utils.pipeline.runner import SeriesFailed, SeriesInterrupted, SeriesPaused, run_series
    from utils.pipeline.stages import STAGES, find_stage
    from utils.secrets import share_secrets

    for name in (from_, to):
        try:
            find_stage(name)
        except (KeyError, ValueError):
            raise UserError(
                f"There is no stage {name!r}; there are {STAGES[0].number} to {STAGES[-1].number}."
            ) from None
    if find_stage(from_).number > find_stage(to).number:
        raise UserError(f"--from {from_} comes after --to {to}; swap them.")
    share_secrets()  # the notebooks' processes could not ask Colab
    try:
        run_series(profile, run_dir, parse_overrides(set_ or []), from_, to, fresh, console)
    except SeriesPaused as pause:
        console.print(
            f"[yellow]to be continued at {pause.stage.name}:[/yellow] {escape(str(pause))}",
            highlight=False,
            soft_wrap=True,
        )
        console.print(f"To go on: {escape(pause.continue_with)}", highlight=False, soft_wrap=True)
        raise typer.Exit(pause.status if isinstance(pause, SeriesInterrupted) else 4) from None
    except SeriesFailed as failure:
        console.print(
            f"[red]{failure.stage.name} failed:[/red] {escape(str(failure))}", highlight=False, soft_wrap=True
        )
        console.print(
            f"To continue, once that is mended: {escape(failure.continue_with)}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from None


@app.command()
def score(run_dir: RunDirArgument) -> None:
    """Recompute every metric from the saved answers; no model is loaded."""
    from utils.evaluation.compare import compare, load_arms, write_comparison
    from utils.evaluation.statistics import show_p
    from utils.files import record_files
    from utils.pipeline.lock import take_lock
    from utils.pipeline.manifest import require_recorded, stale_on_record
    from utils.pipeline.stages import BY_NAME
    from utils.project import command
    from utils.report.answers_page import write_answers
    from utils.report.figures import draw_comparison

    run, stage = _existing(run_dir), BY_NAME["04_comparison"]
    take_lock(run.path, "python -m utils score")
    require_recorded(run.path, (*stage.inputs[:-1], "tuned"))  # all that is read here; the adapter is not
    arms = load_arms(run)
    metrics = compare(run, arms)
    table = write_comparison(run, metrics)
    draw_comparison(arms, metrics, run.file("comparison/comparison.png"))
    write_answers(run, arms)
    run.write_record(
        stage, **{**run.record(stage), "outputs": record_files(run.path, (*stage.outputs, *stage.optional))}
    )
    text = table.to_string(index=False, float_format=lambda x: f"{x:.3f}", formatters={"p": show_p})
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    if stale := stale_on_record(run.manifest(), stage):
        again = f"{stale}; these figures are of the answers from before, and {command()} run --run-dir {run_dir} gives new ones."
        console.print(again, style="yellow", highlight=False, soft_wrap=True, markup=False)
    console.print(metrics["sentence"], style="bold", highlight=False, soft_wrap=True, markup=False)


@app.command()
def verify(run_dir: RunDirArgument) -> None:
    """Rehash every artifact, then load the exports back in a fresh process; exits 1 where anything differs."""
    from utils.export.verify import export_folders, verify_exports
    from utils.pipeline.manifest import altered_files, stale_on_record
    from utils.pipeline.stage import require_hardware
    from utils.pipeline.stages import BY_NAME
    from utils.project import command

    run = _existing(run_dir)
    altered = altered_files(run.path)
    for line in altered:
        console.print(f"[red]✗[/red] {escape(line)}", highlight=False, soft_wrap=True)
    if altered:
        again = f"{command()} run --run-dir {run_dir}"
        told = f"nothing is loaded from files that changed; {again} makes them again, or fetch the run again"
        console.print(escape(told), highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    console.print("[green]✓[/green] every recorded file is as it was written")
    if stale := stale_on_record(run.manifest(), BY_NAME["05_export"]):
        told = (
            f"{stale}; the exports are of the training before, and {command()} run --run-dir {run_dir} makes new ones."
        )
        console.print(told, style="yellow", highlight=False, soft_wrap=True, markup=False)
    if run.record(BY_NAME["05_export"]).get("state") != "done":
        console.print("there is no export to load back yet: 05_export has not run")
        return
    from utils.models.load import prepare_device

    try:
        require_hardware(run, BY_NAME["05_export"])
        prepare_device(run.config)
        figures = verify_exports(run, export_folders(run))
    except UserError as error:
        console.print(f"[red]✗[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    for name, values in figures.items():
        text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())
        console.print(f"[green]✓[/green] {name.replace('_', ' ')}: {escape(text)}", highlight=False, soft_wrap=True)


@app.command()
def bundle(
    check: Annotated[bool, typer.Option(help="Only say whether it is up to date.")] = False,
    notebook: Annotated[str, typer.Option(help="Make this one notebook self-contained instead, such as 03.")] = "",
) -> None:
    """Write kaggle_kernel.ipynb, the whole series in one self-contained notebook."""
    from utils.kaggle.bundle import check_kernel, write_kernel, write_single

    if check:
        check_kernel()
        console.print("kaggle_kernel.ipynb is up to date")
    else:
        path = write_single(notebook) if notebook else write_kernel()
        console.print(f"{path} ({path.stat().st_size / 1000:.0f} kB)", highlight=False, soft_wrap=True)


for command in (remote.push, remote.collect, remote.publish):
    app.command()(command)


def _existing(run_dir: Path):
    from utils.errors import RunDirError
    from utils.pipeline.manifest import read_manifest
    from utils.pipeline.run_dir import open_run

    if not read_manifest(run_dir.resolve()):
        raise RunDirError(f"{run_dir} is no run directory (no manifest.json); make one with python -m utils run.")
    return open_run("auto", run_dir)


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit status 1, an unreachable service in 3."""
    hide_secrets()
    try:
        app()
    except UserError as error:
        told = f"[red]{type(error).__name__}:[/red] {escape(str(error))}"
        Console(stderr=True).print(told, highlight=False, soft_wrap=True)
        status = 3 if isinstance(error, InfrastructureError) else 130 if isinstance(error, Interrupted) else 1
        raise SystemExit(status) from None


if __name__ == "__main__":
    main()
