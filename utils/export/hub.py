"""Upload a run from where the tokens are: adapter and merged model to the Hub, offline tracking to wandb.

One repository for each model and one commit for each upload, so that a repository never shows half a model; an
upload that broke off is taken up by running the same command again. Files on disk are only read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import HubError, InfrastructureError
from utils.evaluation.results import read_sentence
from utils.files import sha256
from utils.kaggle.retry import describe, repeat, status_of
from utils.pipeline.run_dir import open_run, read_manifest, require_recorded
from utils.pipeline.stages import BY_NAME
from utils.project import command
from utils.secrets import Secret

KINDS = ("adapter", "merged")
_SYNC_TIMEOUT_S = 600


@dataclass(frozen=True)
class Upload:
    """What goes into one repository: {path in the repository: file}."""

    kind: str
    repo: str
    files: dict[str, Path]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(path.stat().st_size for path in self.files.values())


def plan_uploads(run_dir: Path, repo: str, merged: bool = False) -> list[Upload]:
    """What would be uploaded where: the adapter to `repo`, with `merged` the merged model to `repo`-merged.

    Only what 05_export has on record goes, and only with the digest on record. Raises HubError where a stage is undone
    or out of date, and where an export is missing or is not what the run wrote.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise HubError(f"--repo is {repo!r}; expected USER/NAME.")
    manifest = read_manifest(run_dir)
    if problem := open_run("auto", run_dir).out_of_date(BY_NAME["05_export"]):
        raise HubError(f"{problem}; run {command()} run --run-dir {run_dir} first, then publish.")
    recorded = manifest["stages"]["05_export"].get("outputs", {})
    for name in recorded:  # a manifest may come from elsewhere: it must not name what else lies on this machine
        if not (run_dir / name).resolve().is_relative_to(run_dir.resolve()):
            raise HubError(f"The manifest names {name}, which lies outside {run_dir}; fetch the run again.")
    uploads = []
    for kind in KINDS if merged else KINDS[:1]:
        prefix = f"export/{kind}/"
        files = {name.removeprefix(prefix): run_dir / name for name in recorded if name.startswith(prefix)}
        if not files or not (run_dir / prefix).is_dir():
            where = "it stays in a Kaggle session's scratch" if kind == "merged" else "05_export writes it"
            raise HubError(
                f"{run_dir / prefix} is not there ({where}); run {command()} run --run-dir {run_dir} --from 05 first."
            )
        if "export/README.md" in recorded:
            files.setdefault("README.md", run_dir / "export/README.md")
        uploads.append(Upload(kind, repo if kind == "adapter" else f"{repo}-{kind}", files))
    for path in {path for upload in uploads for path in upload.files.values()}:
        name = path.relative_to(run_dir).as_posix()
        if not path.is_file() or sha256(path) != recorded[name]["sha256"]:
            word = "differs from what was written" if path.is_file() else "is missing"
            raise HubError(f"{name} {word}; {command()} verify {run_dir} says more, and 05_export writes it anew.")
    return uploads


def upload_model(upload: Upload, token: Secret, private: bool = True, say: Callable[[str], None] = print) -> str:
    """Create the repository where it is missing and upload in one commit; returns the commit's address.

    Rate limits, 5xx and broken connections are tried again. Raises HubError where the Hub refuses, where the repository
    is public and `private` was asked for, and InfrastructureError where the Hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not token:
        raise HubError(
            f"There is no HF_TOKEN here ({token.source}); set it in the environment or in .env, or run hf auth login."
        )
    api = HfApi(token=token.value)
    what = f"uploading to {upload.repo}"

    def create() -> None:
        api.create_repo(upload.repo, private=private, exist_ok=True)
        if private and api.repo_info(upload.repo).private is False:
            raise HubError(f"{upload.repo} exists and is public; name another --repo, or say --public.")

    def commit() -> str:
        operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(upload.files.items())]
        return api.create_commit(upload.repo, operations, commit_message=f"Upload {upload.kind}").commit_url

    repeat(create, passes, _explain(token), f"creating {upload.repo}", say)
    return repeat(commit, passes, _explain(token), what, say)


def passes(error: BaseException) -> bool:
    """Whether it is worth another try: a conflict with another commit, rate limits, 5xx, a connection that broke."""
    import httpx

    if status_of(error) is not None:
        return status_of(error) in (409, 412, 429) or status_of(error) >= 500
    return isinstance(error, httpx.TransportError | ConnectionError)


def _explain(token: Secret) -> Callable[[Exception, str], HubError | InfrastructureError]:
    def explain(error: Exception, what: str) -> HubError | InfrastructureError:
        status, told = status_of(error), describe(error)
        again = "Nothing on disk was changed; the same command again goes on from here."
        if status == 401:
            return HubError(
                f"The Hub does not accept the token from {token.source} ({told}), {what}; make a new one. {again}"
            )
        if status == 403:
            return HubError(
                f"The token from {token.source} may not write there ({told}), {what}; give it write access or name a --repo of "
                f"yours. {again}"
            )
        if status in (409, 412):
            return HubError(f"Somebody else changes the repository at the same time ({told}), {what}. {again}")
        if passes(error):
            return InfrastructureError(f"The Hub could not be reached, {what} ({told}). {again}")
        return HubError(f"The Hub refused, {what} ({told or type(error).__name__}). {again}")

    return explain


def offline_runs(run_dir: Path) -> list[Path]:
    """The wandb runs that were recorded offline and not sent yet."""
    folders = sorted((run_dir / "tracking" / "wandb").glob("offline-run-*"))
    return [folder for folder in folders if not list(folder.glob("*.synced"))]


def sync_tracking(run_dir: Path, key: Secret, say: Callable[[str], None] = print) -> int:
    """Send the offline runs by `wandb sync`; returns how many were sent.

    Raises HubError without a key, InfrastructureError where wandb cannot send; what was not sent stays as it is.
    """
    if not key:
        raise HubError(
            f"There is no WANDB_API_KEY here ({key.source}); set it in the environment or in .env, or --no-wandb."
        )
    environment = {**os.environ, "WANDB_API_KEY": key.value, "WANDB_SILENT": "false"}
    folders = offline_runs(run_dir)
    for number, folder in enumerate(folders):
        command = [sys.executable, "-m", "wandb", "sync", str(folder)]
        try:
            done = subprocess.run(
                command,
                env=environment,
                cwd=run_dir,
                capture_output=True,
                text=True,
                check=False,
                timeout=_SYNC_TIMEOUT_S,
            )
            failed, output = done.returncode != 0 or not list(folder.glob("*.synced")), done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            failed, output = True, f"no end after {_SYNC_TIMEOUT_S} s"
        if failed:
            lines = [line for line in output.replace(key.value, "…").splitlines() if line.strip()]
            raise InfrastructureError(
                f"wandb took {number} of {len(folders)} offline runs ({lines[-1].strip() if lines else 'no message'}); the others "
                "stay in tracking/wandb: run publish again."
            )
        say(f"sent {folder.name}")
    return len(folders)


def describe_uploads(uploads: list[Upload], private: bool, runs: int) -> str:
    """What leaves this machine, with sizes, before anything does."""
    lines = []
    for upload in uploads:
        lines.append(f"{upload.kind} to {upload.repo} ({'private' if private else 'PUBLIC'}), {_size(upload.size)}:")
        lines += [f"  {name:<40} {_size(path.stat().st_size):>10}" for name, path in sorted(upload.files.items())]
    lines.append(f"{runs} offline run(s) to wandb")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"


def read_verdict(run_dir: Path) -> str:
    """The run's verdict, for a last look before it is shown to others."""
    require_recorded(run_dir, ("comparison/metrics.json",))
    return read_sentence(run_dir) if (run_dir / "comparison/metrics.json").exists() else "This run was not compared."
