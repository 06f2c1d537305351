"""Push the kernel notebook to Kaggle: look at what would travel, send it, wait for the end; again where the work is longer."""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from utils.config import expand_home, flatten, load_config
from utils.errors import InfrastructureError, ServiceError
from utils.files import is_there, read_json, write_json, write_text
from utils.kaggle.api import FINISHED, Kaggle, page, split_reference
from utils.kaggle.bundle import MAXIMUM_BYTES, build_kernel, bundled_files
from utils.kaggle.collect import peek
from utils.pipeline.run_dir import SeriesState
from utils.project import ROOT, command
from utils.schema import Config
from utils.secrets import redact

METADATA = ROOT / "kernel-metadata.json"
# All that a push rests on: the package's own defaults change between versions.
_EXPECTED = {
    bool: ("is_private", "enable_gpu", "enable_tpu", "enable_internet"),
    str: ("id", "title", "code_file", "language", "kernel_type", "machine_shape"),
    list: ("dataset_sources", "kernel_sources", "competition_sources", "model_sources"),
}
_UNKNOWN_STATES = 10  # in a row, before waiting is given up
_START_S = 600.0  # after a push, until its session has to be seen queued or running


@dataclass(frozen=True)
class Submission:
    """What one push sends: the metadata with every name filled in, the notebook's text, the session's hours."""

    metadata: dict[str, Any]
    text: str
    hours: float | None = None
    run: bool = True

    @property
    def reference(self) -> str:
        return self.metadata["id"]

    def resuming(self) -> "Submission":
        """The same with the kernel's own last output attached."""
        sources = dict.fromkeys([*self.metadata["kernel_sources"], self.reference])
        return replace(self, metadata={**self.metadata, "kernel_sources": list(sources)})

    def write(self, folder: Path) -> None:
        """The folder that `kaggle kernels push -p` takes."""
        write_json(folder / METADATA.name, self.metadata)
        write_text(folder / self.metadata["code_file"], self.text)

    def describe(self) -> str:
        """Every setting that would be sent; of the notebook size and parameters."""
        settings = [f"{key}: {json.dumps(value)}" for key, value in self.metadata.items()]
        hours = f"hours: {self.hours or 'as Kaggle allows'}; {'run' if self.run else 'saved, and not run'}"
        size = f"text: {len(self.text):,} of {MAXIMUM_BYTES:,} bytes"
        return "\n".join([*settings, hours, size, json.loads(self.text)["cells"][1]["source"]])


def read_metadata() -> dict[str, Any]:
    """kernel-metadata.json; raises ServiceError where a setting is not written out, or is none."""
    try:
        found = read_json(METADATA)
        wrong = [key for kind, keys in _EXPECTED.items() for key in keys if not isinstance(found[key], kind)]
        wrong += [key for key in _EXPECTED[list] if not all(isinstance(part, str) for part in found[key])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServiceError(f"{METADATA} cannot be read ({error!r}); take it back from git.") from None
    if wrong:
        raise ServiceError(f"{METADATA.name} has to write out {', '.join(wrong)}; take it back from git.")
    return found


def find_reference(kaggle: Kaggle, metadata: Mapping[str, Any], username: str = "", slug: str = "") -> str:
    """OWNER/SLUG; the owner is `username`, else the one in `id`, else who is signed in."""
    owner, _, own_slug = metadata["id"].partition("/")
    if owner == "OWNER" and not username:
        username = kaggle.username
    return "/".join(split_reference(f"{username or owner}/{slug or own_slug}"))


def title_of(metadata: Mapping[str, Any], slug: str) -> str:
    """A title that Kaggle turns into `slug`; with another one a second kernel appears beside the first."""
    from slugify import slugify

    return metadata["title"] if slugify(metadata["title"]) == slug else slug.replace("-", " ")


def kernel_text(profile: str = "auto", overrides: Mapping[str, Any] | None = None) -> str:
    """The kernel notebook with its parameters, as JSON; raises ConfigError, ServiceError for what must not leave."""
    overrides = dict(overrides or {})
    config = load_config("t4" if profile == "auto" else profile, overrides)  # auto: what Kaggle's GPU will make of it
    for key, value in _local_files(config):
        if not str(value).startswith("/kaggle/input/"):
            instead = "attach it to the kernel as a data set and give its path below /kaggle/input."
            raise ServiceError(f"{key} is {value}, which lies on this machine; {instead}")
    text = json.dumps(build_kernel(profile, overrides))
    files = ((path.name, path.read_text(encoding="utf-8")) for path in bundled_files())  # base64 hides them in `text`
    for place, content in (("A setting", text), *files):
        if redact(content) != content:
            advice = "take it out: a pushed version cannot be unpushed."
            raise ServiceError(f"{place} holds a secret, or what looks like one; {advice}")
    return text


def _local_files(config: Config) -> list[tuple[str, Any]]:
    """(setting, value) of every setting that names a file or folder."""
    settings = list(flatten(config.model_dump()).items())
    settings += [("evaluate.more_benchmarks", benchmark.path) for benchmark in config.evaluate.more_benchmarks]
    names = [(key, name) for key, name in settings if key in ("model.name", "export.base") and name]
    paths = [(key, value) for key, value in settings if isinstance(value, Path)]
    return paths + [(key, name) for key, name in names if is_there(expand_home(name, key))]


def make_submission(
    kaggle: Kaggle, profile: str, overrides: Mapping[str, Any], username: str = "", slug: str = "", run: bool = True
) -> Submission:
    """What to push; Kaggle shall end the session an hour after the profile's run would end itself."""
    metadata, text = read_metadata(), kernel_text(profile, overrides)
    reference = find_reference(kaggle, metadata, username, slug)
    hours = None if profile == "auto" else load_config(profile, overrides).hardware.max_hours
    filled = {**metadata, "id": reference, "title": title_of(metadata, split_reference(reference)[1])}
    return Submission(filled, text, hours + 1.0 if hours else None, run)


def push(kaggle: Kaggle, what: Submission) -> tuple[int | None, str]:
    """(version, address) of what was sent; raises ServiceError where Kaggle took it in part or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        what.write(Path(folder))
        answer = kaggle.push(Path(folder), what.reference, what.hours, what.run)
    if answer.error:
        raise ServiceError(f"Kaggle did not take the push: {answer.error}")
    kinds = {"dataset": "data sets", "kernel": "kernels", "competition": "competitions", "model": "models"}
    refused = [(word, names) for kind, word in kinds.items() if (names := getattr(answer, f"invalid_{kind}_sources"))]
    url = answer.url or page(what.reference)
    if refused:
        without = "; ".join(f"{word} {', '.join(names)}" for word, names in refused)
        found = f"Kaggle made version {answer.version_number} of {what.reference} without {without}"
        raise ServiceError(f"{found}; stop it at {url}, check those names in {METADATA.name}, and push again.")
    return answer.version_number, url


def push_once(kaggle: Kaggle, what: Submission, console: Console) -> None:
    """`push`, with what to do next; raises as it does."""
    version, url = push(kaggle, what)
    console.print(f"version {version or '?'} of {what.reference} {'runs' if what.run else 'is saved'}: {url}")
    if what.run:
        console.print(f"bring it home: {command('collect', what.reference)}")
    else:
        console.print("open it there, attach HF_TOKEN and WANDB_API_KEY under Add-ons > Secrets, then Save & Run All")


def wait(
    kaggle: Kaggle, reference: str, console: Console, interval_s: float = 30.0, just_pushed: bool = False
) -> tuple[str, str]:
    """(state, message) once the kernel's session has ended; a live line until then.

    With `just_pushed` a session has to be seen at work first. Raises InfrastructureError where Kaggle shows none.
    """
    started, before, silent, seen_at_work = time.monotonic(), "", 0, not just_pushed
    with console.status(reference) as live:
        while True:
            try:
                (state, message), silent = kaggle.status(reference), 0
            except InfrastructureError:
                state, message, silent = "unknown", "", silent + 1
                if silent > _UNKNOWN_STATES:
                    raise
            passed = time.monotonic() - started
            line = f"{reference}: {state} after {passed / 60:.0f} min"
            live.update(line)
            if state != before:
                console.print(line)
            before, seen_at_work = state, seen_at_work or state in ("queued", "running")
            if seen_at_work and state in FINISHED:
                return state, message
            if not seen_at_work and passed > _START_S:
                found = f"no queued or running session of {reference} (the last state: {state})"
                raise InfrastructureError(f"Kaggle took the push, but shows {found}; look at {page(reference)}.")
            time.sleep(interval_s)


def require_unfinished(kaggle: Kaggle, reference: str) -> None:
    """Raise ServiceError where the last session left nothing, or is done; one that failed kept what it had finished."""
    state = peek(kaggle, reference)
    if state is None or state.state == "done":
        word = "left no run directory" if state is None else "is done"
        raise ServiceError(f"The last session of {reference} {word}, so there is nothing to resume; drop --continue.")


def push_until_done(
    kaggle: Kaggle, what: Submission, console: Console, sessions: int = 6, interval_s: float = 30.0
) -> SeriesState | None:
    """Push `what`, and again with the last output attached, until a session is not to be continued; its state.

    Raises ServiceError after `sessions` sessions, and where two in a row got no further.
    """
    before = ("", -1)
    for number in range(1, sessions + 1):
        version, url = push(kaggle, what)
        console.print(f"session {number}: version {version}, {url}")
        wait(kaggle, what.reference, console, interval_s, just_pushed=True)
        state = peek(kaggle, what.reference)
        if state is None or state.state != "continue":
            return state
        reached = (state.stage, state.steps)  # their names are in order
        if reached <= before:
            found = f"Two sessions in a row ended at {state.stage} with {state.steps} saved: {state.sentence}"
            raise ServiceError(f"{found}; raise hardware.max_hours, or lower train.save_steps.")
        before, what = reached, what.resuming()
        console.print(f"  to be continued at {state.stage}, with {state.steps} steps or answers saved")
    raise ServiceError(f"The series is not done after {sessions} sessions; push --continue --until-done for more.")
