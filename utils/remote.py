"""The commands that talk to Kaggle, the Hub and wandb: push, collect, publish."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from utils.config import parse_overrides
from utils.errors import HubError, KaggleError, RunDirError
from utils.project import NAME, command

console = Console(force_terminal=sys.stdout.isatty())
UserOption = Annotated[str, typer.Option(help="Your Kaggle user name; else the one that you are signed in as.")]
PollOption = Annotated[float, typer.Option(help="Seconds between two questions about the session.")]


def push(
    profile: Annotated[str, typer.Option(help="demo, tutorial, t4 or full; auto picks by the hardware.")] = "auto",
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting, such as train.max_steps=10.")] = None,
    username: UserOption = "",
    slug: Annotated[str, typer.Option(help="Another name for the kernel.")] = "",
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Save it only: attach secrets in the editor, run there.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the session has ended.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
    continue_: Annotated[bool, typer.Option("--continue", help="Go on from the last session's output.")] = False,
    until_done: Annotated[bool, typer.Option("--until-done", help="Session after session, until it is done.")] = False,
    sessions: Annotated[int, typer.Option(help="With --until-done: at most so many.")] = 6,
    poll: PollOption = 30.0,
) -> None:
    """Push the series to Kaggle; exits 0 when it was taken, 1 when it was refused, 3 when Kaggle cannot be reached."""
    from utils.kaggle import push as pushing
    from utils.kaggle import sessions as chain
    from utils.kaggle.api import Kaggle

    if no_run and until_done:
        raise KaggleError("--no-run saves a version without a session, so --until-done would wait for none; drop one.")
    overrides = parse_overrides(set_ or [])
    metadata = pushing.read_metadata()
    text = pushing.kernel_text(profile, overrides)
    named = bool(username) or not metadata["id"].startswith("OWNER/")
    kaggle = None if dry_run and named and not continue_ else Kaggle(_say)
    reference = pushing.reference_of(metadata, username or ("" if named or kaggle is None else kaggle.username), slug)

    def submission(manifest: dict | None = None) -> pushing.Submission:
        if manifest is None:
            hours = pushing.session_hours(profile, overrides)
            return pushing.submission(metadata, reference, text, not no_run, hours)
        hours = pushing.session_hours(manifest["profile"], {**manifest["overrides"], **overrides})
        return pushing.submission(metadata, reference, text, not no_run, hours, (reference,))

    first = submission(chain.read_unfinished(kaggle, reference) if continue_ else None)
    if dry_run:
        folder = Path(tempfile.mkdtemp(prefix=f"{NAME}-"))
        first.write(folder)
        _print(f"{first.describe()}\nall of it is in {folder}; nothing was sent")
        return
    if until_done:
        state = chain.push_until_done(kaggle, first, submission, console, sessions, poll)
        _print(f"the last session ended as {state.state if state else 'unknown'}")
        collect(reference, poll=poll)
        return
    version, url = pushing.push(kaggle, first)
    _print(f"version {version or '?'} of {reference} {'is saved' if no_run else 'runs'}: {url}")
    if no_run:
        _print("open it there, attach HF_TOKEN and WANDB_API_KEY under Add-ons > Secrets, then Save & Run All")
    elif wait:
        status, message = pushing.wait(kaggle, reference, console, poll, just_pushed=True)
        _print(f"{reference}: {pushing.readable(status)}{f': {message}' if message else ''}")
    if not no_run:
        _print(f"bring it home: {command()} collect {reference}")
    if wait and not no_run and status != "COMPLETE":
        raise typer.Exit(1 if status == "ERROR" else 3)


def collect(
    ref: Annotated[str, typer.Argument(help="OWNER/SLUG; by default the kernel of kernel-metadata.json.")] = "",
    run_dir: Annotated[str, typer.Option(help="Where to; runs/kaggle-SLUG by default.")] = "",
    username: UserOption = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the session has ended.")] = False,
    poll: PollOption = 30.0,
) -> None:
    """Fetch a kernel's log and output and classify how it ended; exits 0 pass, 1 fail, 3 infrastructure, 4 to be continued."""
    from utils.kaggle import collect as collecting
    from utils.kaggle import push as pushing
    from utils.kaggle.api import Kaggle

    kaggle = Kaggle(_say)
    if not ref:
        metadata = pushing.read_metadata()
        named = not metadata["id"].startswith("OWNER/")
        ref = pushing.reference_of(metadata, username or ("" if named else kaggle.username))
    if wait:
        pushing.wait(kaggle, ref, console, poll)
    target = Path(run_dir).resolve() if run_dir else collecting.default_target(ref)
    collected = collecting.collect(kaggle, ref, target, console)
    collecting.show(collected, ref, console)
    if collected.outcome == collecting.Outcome.PASS:
        _print(f"look at {target / 'report' / 'index.html'}; upload it: {command()} publish {target} --repo USER/NAME")
    elif collected.outcome == collecting.Outcome.CONTINUE:
        _print(f"resume it: {command()} push --continue")
    raise typer.Exit(int(collected.outcome))


def publish(
    run_dir: Annotated[Path, typer.Argument(help="A run directory, such as runs/demo.")],
    repo: Annotated[str, typer.Option(help="The Hub repository for the adapter, USER/NAME.")] = "",
    merged: Annotated[bool, typer.Option("--merged", help="Also the merged model, to USER/NAME-merged.")] = False,
    private: Annotated[bool, typer.Option("--private/--public", help="Who can see it.")] = True,
    wandb: Annotated[bool, typer.Option("--wandb/--no-wandb", help="Send the offline tracking too.")] = True,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded, and upload nothing.")
    ] = False,
) -> None:
    """Upload a run to the Hub and its offline tracking to wandb, from where the tokens are."""
    from utils.export import hub as publishing
    from utils.pipeline.manifest import read_manifest
    from utils.secrets import find_secret

    run_dir = run_dir.resolve()
    if not read_manifest(run_dir):
        raise RunDirError(f"{run_dir} is no run directory (no manifest.json); give one, such as runs/demo.")
    key = find_secret("WANDB_API_KEY")
    runs = publishing.offline_runs(run_dir) if wandb else []
    if not repo and not runs:
        raise HubError("There is nothing to upload: no --repo, and no offline run of wandb.")
    uploads = publishing.plan_uploads(run_dir, repo, merged) if repo else []
    _print(publishing.read_verdict(run_dir))
    _print(publishing.describe_uploads(uploads, private, len(runs)))
    if not (dry_run or yes or sys.stdin.isatty()):
        raise HubError(
            "Nobody can be asked here whether to upload this (no terminal); say --yes, or look by --dry-run."
        )
    if dry_run or (not yes and not typer.confirm("Upload this?")):
        _print("nothing was uploaded")
        return
    token = find_secret("HF_TOKEN")
    for upload in uploads:
        _print(f"{upload.kind}: {publishing.upload_model(upload, token, private, _say)}")
    if runs and key:
        publishing.sync_tracking(run_dir, key, _say)
    elif runs:
        _print(f"tracking stays here: there is no WANDB_API_KEY ({key.source})")


def _print(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _say(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)
