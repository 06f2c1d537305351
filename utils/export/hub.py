"""Upload a run from where the tokens are: models to the Hub, a commit each; offline tracking to wandb."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from utils.errors import InfrastructureError, ServiceError, UserError, first_line
from utils.export.places import export_folders, scratch_folder
from utils.files import is_folder, list_files
from utils.pipeline.console import read_sentence
from utils.pipeline.run_dir import RunDir, open_run, require_recorded
from utils.pipeline.stages import BY_NAME
from utils.processes import Child
from utils.project import command
from utils.secrets import Secret, find_secret

_BESIDE = {"adapter": "", "merged": "-merged", "gguf": "-GGUF"}  # the names of the repositories


@dataclass(frozen=True)
class Upload:
    """What goes into one repository: {path in the repository: file}."""

    kind: str
    repo: str
    files: dict[str, Path]


def plan_uploads(run_dir: Path, repo: str, kinds: Sequence[str] = ("adapter",)) -> list[Upload]:
    """What would be uploaded where: the adapter to `repo`, the others beside it.

    Only what 05_export has on record goes. Raises ServiceError where a stage is undone or out of date or an export is
    missing, RunDirError where it is not what the run wrote.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ServiceError(f"--repo is {repo!r}; expected USER/NAME.")
    run, uploads = open_run("auto", run_dir), []
    if problem := run.out_of_date(BY_NAME["05_export"]):
        raise ServiceError(f"{problem}; run {command('run', '--run-dir', run_dir)} first, then publish.")
    for kind in kinds:
        files = recorded_files(run, kind)
        if not files:
            why = "05_export was not asked for it, or it ended with its session's scratch"
            again = f"ask for it by export.{kind}, or delete {run_dir / 'export'}, and run the series again"
            raise ServiceError(f"{run_dir / 'export' / kind} is not there ({why}); {again}.")
        uploads.append(Upload(kind, repo + _BESIDE[kind], files))
    return uploads


def recorded_files(run: RunDir, kind: str) -> dict[str, Path]:
    """{name: file} of an export as 05 left it, in the run directory or in this session's scratch; else empty.

    Raises RunDirError for a file that changed since, ServiceError for one that lies outside its folder.
    """
    prefix, folder = f"export/{kind}/", run.file(f"export/{kind}")
    outputs = run.record(BY_NAME["05_export"]).get("outputs", {})
    files = {name.removeprefix(prefix): run.path / name for name in outputs if name.startswith(prefix)}
    if files and is_folder(folder):
        require_recorded(run.path, (f"export/{kind}",))
    else:
        folder, files = scratch_folder(run, kind), {}
        if export_folders(run).get(kind) == folder:
            files = {path.relative_to(folder).as_posix(): path for path in list_files(folder, "")}
    for path in files.values():  # a record may come from elsewhere, and its link lead to a private file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ServiceError(f"{run.path} names {path}, which lies outside the export; fetch the run again.")
    return files


def push_to_hub(run: RunDir, folders: Mapping[str, Path]) -> None:
    """Upload each export where `export.push_to_hub` says; a failure is printed, with the line that finishes it."""
    repo, token = run.config.export.push_to_hub, find_secret("HF_TOKEN")
    flags = [f"--{kind}" for kind in folders if kind != "adapter"]
    again = command("publish", run.path, "--repo", repo or "USER/NAME", *flags)
    if not (repo and token):
        lack = f"there is no HF_TOKEN here ({token.source})" if repo else "export.push_to_hub names no repository"
        print(f"Nothing is uploaded: {lack}. This does it from where a token is:\n  {again}")
        return
    for kind, folder in folders.items():
        files = {path.relative_to(folder).as_posix(): path for path in list_files(folder, "")}
        try:
            print(f"{kind}: {upload_model(Upload(kind, repo + _BESIDE[kind], files), token, again=again)}")
        except UserError as error:  # the stage is done all the same
            lost = "" if folder.is_relative_to(run.path) else " It ends with this session: mend that, and run 05 again."
            print(f"{kind} is not uploaded. {error}{lost}")


def upload_model(upload: Upload, token: Secret, private: bool = True, again: str = "the same command again") -> str:
    """Upload in one commit and return its address; raises ServiceError or InfrastructureError.

    Large files go before the commit, by Xet or LFS; the Hub keeps those that arrived, and `again` sends only the others.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not token:
        raise ServiceError(f"There is no HF_TOKEN here ({token.source}); set it in .env, or run hf auth login.")
    api = HfApi(token=token.value)
    try:
        operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(upload.files.items())]
        api.create_repo(upload.repo, private=private, exist_ok=True)
        if api.repo_info(upload.repo).private in (None, private):  # one that exists stays as it is
            return api.create_commit(upload.repo, operations, commit_message=f"Upload {upload.kind}").commit_url
    except Exception as error:  # huggingface_hub has many types and wraps a thread's in RuntimeError; Xet has its own
        wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
        raise _explain(error.__cause__ if wrapped else error, upload, token, again) from None
    now = "public" if private else "private"
    raise ServiceError(f"{upload.repo} is {now}; publish with --{now}, change that on the Hub, or name another.")


def _explain(error: Exception, upload: Upload, token: Secret, again: str) -> ServiceError | InfrastructureError:
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
    elif not status:
        problem, message = "The upload failed", f"{type(error).__name__}: {first_line(error)}"
    found = f"{status}: {message}" if status else message
    return kind(f"{problem} ({found}), uploading to {upload.repo}. Nothing on disk was changed; {again} resumes.")


def offline_runs(run_dir: Path) -> list[Path]:
    """The wandb runs that were recorded offline and not sent yet."""
    folders = sorted((run_dir / "tracking" / "wandb").glob("offline-run-*"))
    return [folder for folder in folders if not list(folder.glob("*.synced"))]


def sync_tracking(run_dir: Path, key: Secret) -> None:
    """Send the offline runs by `wandb sync`; raises InfrastructureError where wandb cannot, and what is left stays."""
    environment = {"WANDB_API_KEY": key.value, "WANDB_SILENT": "false", "WANDB_DIR": str(run_dir)}
    folders = offline_runs(run_dir)
    words = [sys.executable, "-m", "wandb", "sync", *folders]
    with tempfile.TemporaryDirectory() as scratch, Child(words, Path(scratch) / "log", environment) as child:
        with suppress(subprocess.TimeoutExpired):
            child.wait(600 * len(folders))  # seconds
        if left := len(offline_runs(run_dir)):
            said = child.last_words() if child.poll() is not None else f"no end after {600 * len(folders)} s"
            found = f"wandb took {len(folders) - left} of {len(folders)} offline runs ({said})"
            raise InfrastructureError(f"{found}; the others stay in tracking/wandb: run publish again.")


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
