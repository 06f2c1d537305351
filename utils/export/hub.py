"""Upload a run from where the tokens are: models to the Hub, a commit each; offline tracking to wandb."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from utils.errors import InfrastructureError, ServiceError
from utils.pipeline.console import read_sentence
from utils.pipeline.run_dir import open_run, read_manifest, require_recorded
from utils.pipeline.stages import BY_NAME
from utils.processes import Child
from utils.project import command
from utils.secrets import Secret

_SYNC_TIMEOUT_S = 600


@dataclass(frozen=True)
class Upload:
    """What goes into one repository: {path in the repository: file}."""

    kind: str
    repo: str
    files: dict[str, Path]


def plan_uploads(run_dir: Path, repo: str, merged: bool = False) -> list[Upload]:
    """What would be uploaded where: the adapter to `repo`, with `merged` the merged model to `repo`-merged.

    Only what 05_export has on record goes. Raises ServiceError where a stage is undone or out of date or an export is
    missing, RunDirError where it is not what the run wrote.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ServiceError(f"--repo is {repo!r}; expected USER/NAME.")
    if problem := open_run("auto", run_dir).out_of_date(BY_NAME["05_export"]):
        raise ServiceError(f"{problem}; run {command('run', '--run-dir', run_dir)} first, then publish.")
    recorded = read_manifest(run_dir)["stages"]["05_export"].get("outputs", {})
    uploads = []
    for kind in ("adapter", "merged") if merged else ("adapter",):
        prefix = f"export/{kind}/"
        files = {name.removeprefix(prefix): run_dir / name for name in recorded if name.startswith(prefix)}
        if not files or not (run_dir / prefix).is_dir():
            where = "it stays in a Kaggle session's scratch" if kind == "merged" else "05_export writes it"
            again = command("run", "--run-dir", run_dir, "--from", "05")
            raise ServiceError(f"{run_dir / prefix} is not there ({where}); run {again} first.")
        require_recorded(run_dir, (prefix.rstrip("/"),))
        for name, path in files.items():  # a manifest may come from elsewhere, and its link lead to a private file
            if not path.resolve().is_relative_to(run_dir.resolve()):
                raise ServiceError(f"The manifest names {name}, which lies outside {run_dir}; fetch the run again.")
        uploads.append(Upload(kind, repo if kind == "adapter" else f"{repo}-{kind}", files))
    return uploads


def upload_model(upload: Upload, token: Secret, private: bool = True) -> str:
    """Upload in one commit and return its address; raises ServiceError or InfrastructureError."""
    from huggingface_hub import CommitOperationAdd, HfApi

    if not token:
        raise ServiceError(f"There is no HF_TOKEN here ({token.source}); set it in .env, or run hf auth login.")
    api = HfApi(token=token.value)
    operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(upload.files.items())]
    try:
        api.create_repo(upload.repo, private=private, exist_ok=True)
        if private and api.repo_info(upload.repo).private is False:
            raise ServiceError(f"{upload.repo} exists and is public; name another --repo, or say --public.")
        return api.create_commit(upload.repo, operations, commit_message=f"Upload {upload.kind}").commit_url
    except (httpx.HTTPError, ValueError, OSError) as error:
        raise _explain(error, upload, token) from None


def _explain(error: Exception, upload: Upload, token: Secret) -> ServiceError | InfrastructureError:
    """What huggingface_hub raised, as a sentence: refused by the Hub, or not reached."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    message = getattr(error, "server_message", None) or type(error).__name__
    kind, problem = ServiceError, "The Hub refused"
    if status == 401:
        problem = f"The Hub does not accept the token from {token.source}; make a new one"
    elif status == 403:
        problem = f"The token from {token.source} may not write there; give it write access or name a --repo of yours"
    elif status == 429 or status >= 500 or isinstance(error, httpx.TransportError | ConnectionError):
        kind, problem = InfrastructureError, "The Hub could not be reached"
    found = f"{status}: {message}" if status else message
    again = "Nothing on disk was changed; the same command again resumes."
    return kind(f"{problem} ({found}), uploading to {upload.repo}. {again}")


def offline_runs(run_dir: Path) -> list[Path]:
    """The wandb runs that were recorded offline and not sent yet."""
    folders = sorted((run_dir / "tracking" / "wandb").glob("offline-run-*"))
    return [folder for folder in folders if not list(folder.glob("*.synced"))]


def sync_tracking(run_dir: Path, key: Secret, log: Callable[[str], None] = print) -> None:
    """Send the offline runs by `wandb sync`; raises InfrastructureError where wandb cannot, and what is left stays."""
    environment = {"WANDB_API_KEY": key.value, "WANDB_SILENT": "false", "WANDB_DIR": str(run_dir)}
    folders = offline_runs(run_dir)
    for number, folder in enumerate(folders):
        words = [sys.executable, "-m", "wandb", "sync", folder]
        with tempfile.TemporaryDirectory() as scratch, Child(words, Path(scratch) / "log", environment) as child:
            try:
                status, problem = child.wait(_SYNC_TIMEOUT_S), child.last_words()
            except subprocess.TimeoutExpired:
                status, problem = 1, f"no end after {_SYNC_TIMEOUT_S} s"
        if status or not list(folder.glob("*.synced")):
            found = f"wandb took {number} of {len(folders)} offline runs ({problem})"
            raise InfrastructureError(f"{found}; the others stay in tracking/wandb: run publish again.")
        log(f"sent {folder.name}")


def describe_uploads(uploads: list[Upload], private: bool, runs: int) -> str:
    """What leaves this machine, with sizes, before anything does."""
    lines = []
    for upload in uploads:
        sizes = {name: path.stat().st_size / 2**20 for name, path in sorted(upload.files.items())}
        seen_by = "private" if private else "PUBLIC"
        lines.append(f"{upload.kind} to {upload.repo} ({seen_by}), {sum(sizes.values()):,.2f} MiB:")
        lines += [f"  {name:<40} {size:>10,.2f} MiB" for name, size in sizes.items()]
    return "\n".join([*lines, f"{runs} offline run(s) to wandb"])


def read_verdict(run_dir: Path) -> str:
    """The run's verdict, for a last look before it is shown to others."""
    require_recorded(run_dir, ("comparison/metrics.json",))
    return read_sentence(run_dir) if (run_dir / "comparison/metrics.json").exists() else "This run was not compared."
