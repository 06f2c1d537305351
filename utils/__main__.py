"""The command line: `python -m utils run | score | verify | ask | bundle | push | collect | publish`."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error.name} is not installed for {sys.executable}; run make demo, then .venv/bin/python -m utils."
    ) from None

from utils.config import parse_overrides, profile_names
from utils.errors import InfrastructureError, Interrupted, RunDirError, ServiceError, UserError
from utils.pipeline.console import make_console
from utils.pipeline.run_dir import RunDir, altered_files, open_run, read_manifest, require_recorded
from utils.pipeline.stages import BY_NAME, Stage, find_stage
from utils.project import NAME, command
from utils.secrets import find_secret, hide_secrets, share_secrets

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = make_console()
RunDirArgument = Annotated[Path, typer.Argument(help="A run directory, such as runs/demo.")]
ProfileOption = Annotated[str, typer.Option(help=f"{', '.join(profile_names())}; auto picks by the hardware.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="A setting, such as train.max_steps=10.")]
RatingsOption = Annotated[Path | None, typer.Option(help="What comparison/rate.html saved; later scores keep it.")]
UserOption = Annotated[str, typer.Option(help="Your Kaggle user name; else the one that you are signed in as.")]
PollOption = Annotated[float, typer.Option(help="Seconds between two questions about the session.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait until the session has ended.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")]


@app.command()
def run(
    profile: ProfileOption = "auto",
    run_dir: Annotated[str, typer.Option(help="Where everything is written; runs/PROFILE by default.")] = "",
    set_: SetOption = None,
    from_: Annotated[str, typer.Option("--from", help="First stage, 00 to 05.")] = "00",
    to: Annotated[str, typer.Option(help="Last stage, 00 to 05.")] = "05",
    fresh: Annotated[bool, typer.Option(help="Read the profile again and run every stage anew.")] = False,
) -> None:
    """Run the series: six notebooks in order, those that are unchanged left out, and a report at the end.

    Exits 0 when every stage passed, 1 when one failed, 4 when the session's time was up first (hardware.max_hours), 130
    and 143 when it was stopped by Ctrl-C or SIGTERM.
    """
    from utils.pipeline.runner import StageEnded, run_series
    from utils.report.index import conclude

    first, last = find_stage(from_).number, find_stage(to).number
    if first > last:
        raise UserError(f"--from {from_} comes after --to {to}; swap them.")
    share_secrets()  # the notebooks' processes could not ask Colab
    started = time.monotonic()
    try:
        run_series(
            profile, run_dir, parse_overrides(set_ or []), first, last, fresh, console,
            conclude=lambda run, worked: conclude(run, worked, console, time.monotonic() - started),
        )  # fmt: skip
    except StageEnded as ended:
        failed = ended.exit_code == 1
        head = f"{ended.stage.name} failed" if failed else f"to be continued at {ended.stage.name}"
        console.print(f"{head}: {ended}", style="red" if failed else "yellow")
        console.print(f"To resume{', once that is mended' if failed else ''}: {ended.resume}")
        raise typer.Exit(ended.exit_code) from None


@app.command()
def score(run_dir: RunDirArgument, ratings: RatingsOption = None) -> None:
    """Recompute every metric from the saved answers; no model is loaded."""
    from utils import evaluation, report
    from utils.files import record_files
    from utils.pipeline.lock import take_lock

    run, stage = _open(run_dir), BY_NAME["04_comparison"]
    take_lock(run.path, "python -m utils score")
    require_recorded(run.path, (*stage.inputs[:-1], "tuned"))  # all that is read here; the adapter is not
    base, tuned = evaluation.read_evaluation(run, "base"), evaluation.read_evaluation(run, "tuned")
    if ratings is not None:
        evaluation.keep_ratings(run, base, tuned, ratings)
    metrics = evaluation.compare_models(run, base, tuned)
    table = evaluation.write_comparison(run, metrics)
    report.draw_comparison(base, tuned, metrics, run.file("comparison/comparison.png"))
    report.write_answers_page(run, base, tuned)
    report.write_rating_page(run, base, tuned)
    outputs = record_files(run.path, (*stage.outputs, *stage.optional))
    run.write_record(stage, **{**run.record(stage), "outputs": outputs})
    if run.file("report/index.html").exists():
        report.write_report(run)  # which shows the claims
    console.print(table.to_string(index=False, float_format=lambda x: f"{x:.3f}", formatters={"p": evaluation.show_p}))
    _warn_if_stale(run, stage)
    console.print(metrics["sentence"], style="bold")
    if ratings is not None:
        console.print(evaluation.state_preference(run, base, tuned)[0]["sentence"])


@app.command()
def verify(run_dir: RunDirArgument) -> None:
    """Rehash every artifact, then load the exports back in a fresh process; exits 1 where anything differs."""
    from utils.export.places import export_folders
    from utils.export.verify import verify_exports
    from utils.models.load import prepare_device
    from utils.pipeline.stage import require_hardware

    run, stage = _open(run_dir), BY_NAME["05_export"]
    if altered := altered_files(run.path):
        for line in altered:
            console.print(f"✗ {line}", style="red")
        again = f"{command('run', '--run-dir', run_dir)} makes them again, or fetch the run again"
        raise RunDirError(f"nothing is loaded from files that changed; {again}")
    console.print("✓ every recorded file is as it was written", style="green")
    _warn_if_stale(run, stage)
    if run.record(stage).get("state") != "done":
        console.print("there is no export to load back yet: 05_export has not run")
        return
    require_hardware(run, stage)
    prepare_device(run.config)
    for name, values in verify_exports(run, export_folders(run)).items():
        text = ", ".join(f"{key} {value}" for key, value in values.items())
        console.print(f"✓ {name}: {text}".replace("_", " "), style="green")


@app.command()
def ask(
    run_dir: RunDirArgument, question: Annotated[str, typer.Argument(help="A question of your own, in quotes.")]
) -> None:
    """Answer a question of your own by the base and the fine-tuned model, as they write; the run stays as it is."""
    from utils import evaluation
    from utils.pipeline.stage import require_hardware

    run = _open(run_dir)
    evaluation.require_adapter(run)
    require_hardware(run, BY_NAME["04_comparison"])
    evaluation.ask(run, *evaluation.load_for_inference(run, "tuned"), question)


@app.command()
def bundle(
    check: Annotated[bool, typer.Option(help="Only say whether it is up to date.")] = False,
    notebook: Annotated[str, typer.Option(help="Make this one notebook self-contained instead, such as 03.")] = "",
) -> None:
    """Write kaggle_kernel.ipynb, the whole series in one self-contained notebook."""
    from utils.kaggle.bundle import check_kernel, write_bundle

    if check:
        check_kernel()
        console.print("kaggle_kernel.ipynb is up to date")
    else:
        path = write_bundle(notebook)
        console.print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


@app.command()
def push(
    profile: ProfileOption = "auto",
    set_: SetOption = None,
    username: UserOption = "",
    slug: Annotated[str, typer.Option(help="Another name for the kernel.")] = "",
    no_run: Annotated[bool, typer.Option("--no-run", help="Save only, to attach secrets and run there.")] = False,
    wait: WaitOption = False,
    dry_run: DryRunOption = False,
    continue_: Annotated[bool, typer.Option("--continue", help="Resume from the last session's output.")] = False,
    until_done: Annotated[bool, typer.Option("--until-done", help="Session after session, until it is done.")] = False,
    sessions: Annotated[int, typer.Option(help="With --until-done: at most so many.")] = 6,
    poll: PollOption = 30.0,
) -> None:
    """Push the series to Kaggle; exits 0 when it was taken, 1 when refused, 3 when Kaggle cannot be reached.

    With --wait also 1 when the session failed, 3 when it was cancelled; with --until-done as `collect` does.
    """
    from utils.kaggle import push as kaggle_push
    from utils.kaggle.api import Kaggle

    if no_run and until_done:
        raise ServiceError("--no-run starts no session that --until-done could wait for; drop one.")
    kaggle = Kaggle(_log)
    what = kaggle_push.make_submission(kaggle, profile, parse_overrides(set_ or []), username, slug, not no_run)
    if continue_:
        kaggle_push.require_unfinished(kaggle, what.reference)
        what = what.resuming()
    if dry_run:
        folder = Path(tempfile.mkdtemp(prefix=f"{NAME}-"))
        what.write(folder)
        console.print(f"{what.describe()}\nall of it is in {folder}; nothing was sent")
    elif until_done:
        state = kaggle_push.push_until_done(kaggle, what, console, sessions, poll)
        console.print(f"the last session ended as {state.state if state else 'unknown'}")
        collect(what.reference, poll=poll)
    else:
        kaggle_push.push_once(kaggle, what, console)
        if wait and not no_run:
            status, message = kaggle_push.wait(kaggle, what.reference, console, poll, just_pushed=True)
            console.print(f"{what.reference}: {status}{f': {message}' if message else ''}")
            raise typer.Exit({"complete": 0, "error": 1}.get(status, 3))


@app.command()
def collect(
    ref: Annotated[str, typer.Argument(help="OWNER/SLUG; by default the kernel of kernel-metadata.json.")] = "",
    run_dir: Annotated[str, typer.Option(help="Where to; runs/kaggle-SLUG by default.")] = "",
    username: UserOption = "",
    wait: WaitOption = False,
    poll: PollOption = 30.0,
) -> None:
    """Fetch a kernel's log and output and classify how it ended; exits 0 pass, 1 fail, 3 infrastructure, 4 to be continued."""
    from utils.kaggle import collect as kaggle_collect
    from utils.kaggle import push as kaggle_push
    from utils.kaggle.api import Kaggle, split_reference

    kaggle = Kaggle(_log)
    ref = ref or kaggle_push.find_reference(kaggle, kaggle_push.read_metadata(), username)
    if wait:
        kaggle_push.wait(kaggle, ref, console, poll)
    target = Path(run_dir or f"runs/kaggle-{split_reference(ref)[1]}").resolve()
    collected = kaggle_collect.collect(kaggle, ref, target, console)
    kaggle_collect.show(collected, ref, target, console)
    raise typer.Exit(int(collected.outcome))


@app.command()
def publish(
    run_dir: RunDirArgument,
    repo: Annotated[str, typer.Option(help="The Hub repository for the adapter, USER/NAME.")] = "",
    merged: Annotated[bool, typer.Option("--merged", help="Also the merged model, to USER/NAME-merged.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="Also the GGUF files, to USER/NAME-GGUF.")] = False,
    private: Annotated[bool, typer.Option("--private/--public", help="Who can see it.")] = True,
    wandb: Annotated[bool, typer.Option("--wandb/--no-wandb", help="Send the offline tracking too.")] = True,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Upload a run to the Hub and its offline tracking to wandb, from where the tokens are."""
    from utils.export import hub

    run_dir = _open(run_dir).path
    runs = hub.offline_runs(run_dir) if wandb else []
    if not repo and not runs:
        raise ServiceError("There is nothing to upload: no --repo, and no offline run of wandb.")
    kinds = ["adapter"] + ["merged"] * merged + ["gguf"] * gguf
    uploads = hub.plan_uploads(run_dir, repo, kinds) if repo else []
    console.print(f"{hub.read_verdict(run_dir)}\n{hub.describe_uploads(uploads, private, len(runs))}")
    if not (dry_run or yes or sys.stdin.isatty()):
        raise ServiceError("There is no terminal to ask whether to upload this; say --yes, or look by --dry-run.")
    if dry_run or (not yes and not typer.confirm("Upload this?")):
        console.print("nothing was uploaded")
        return
    token, key = find_secret("HF_TOKEN"), find_secret("WANDB_API_KEY")
    for upload in uploads:
        console.print(f"{upload.kind}: {hub.upload_model(upload, token, private)}")
    if runs and key:
        hub.sync_tracking(run_dir, key)
        console.print(f"{len(runs)} offline run(s) went to wandb")
    elif runs:
        console.print(f"tracking stays here: there is no WANDB_API_KEY ({key.source})")


def _warn_if_stale(run: RunDir, stage: Stage) -> None:
    if stale := run.out_of_date(stage):
        again = f"{command('run', '--run-dir', run.path)} makes them anew"
        console.print(f"{stale}; the results here are those from before, and {again}.", style="yellow")


def _open(run_dir: Path) -> RunDir:
    if not read_manifest(run_dir.resolve()):
        raise RunDirError(f"{run_dir} is no run directory (no manifest.json); make one with python -m utils run.")
    return open_run("auto", run_dir)


def _log(text: str) -> None:
    make_console(stderr=True).print(text)


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit status 1, an unreachable service in 3."""
    hide_secrets()
    try:
        app()
    except UserError as error:
        _log(f"{type(error).__name__}: {error}")
        status = 3 if isinstance(error, InfrastructureError) else 130 if isinstance(error, Interrupted) else 1
        raise SystemExit(status) from None


if __name__ == "__main__":
    main()
