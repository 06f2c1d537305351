"""Push the kernel notebook to Kaggle: look at what would travel, send it, read the answer, wait for the end."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from utils.config import expand_home, load_config
from utils.errors import InfrastructureError, KaggleError
from utils.files import is_there, parse_json, write_json, write_text
from utils.kaggle.api import FINISHED, Kaggle, page, split_reference
from utils.kaggle.bundle import MAXIMUM_BYTES, build_kernel, bundled_files
from utils.project import ROOT
from utils.schema import Config
from utils.secrets import redact

METADATA = ROOT / "kernel-metadata.json"
# All that a push rests on: the package's own defaults change between versions.
_EXPECTED = {
    bool: ("is_private", "enable_gpu", "enable_tpu", "enable_internet"),
    str: ("id", "title", "code_file", "language", "kernel_type", "machine_shape"),
    list: ("dataset_sources", "kernel_sources", "competition_sources", "model_sources"),
}
_GRACE_HOURS = 1.0  # between the run's own end and the one that Kaggle enforces: saving, exports
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
        """OWNER/SLUG."""
        return self.metadata["id"]

    def write(self, folder: Path) -> None:
        """The folder that `kaggle kernels push -p` takes."""
        write_json(folder / METADATA.name, self.metadata)
        write_text(folder / self.metadata["code_file"], self.text)

    def describe(self) -> str:
        """Every setting that would be sent; of the notebook size, digest and parameters."""
        lines = [f"{key}: {json.dumps(value)}" for key, value in self.metadata.items()]
        lines += [f"hours: {self.hours or 'as Kaggle allows'}; {'run' if self.run else 'saved, and not run'}"]
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        lines += [f"text: {len(self.text):,} of {MAXIMUM_BYTES:,} bytes, sha256 {digest}"]
        return "\n".join([*lines, json.loads(self.text)["cells"][1]["source"]])


def read_metadata() -> dict[str, Any]:
    """kernel-metadata.json; raises KaggleError where a setting is not written out, or is none."""
    try:
        metadata = parse_json(METADATA.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KaggleError(f"{METADATA} cannot be read ({error}); take it back from git.") from None
    found = metadata if isinstance(metadata, dict) else {}
    wrong = [key for kind, keys in _EXPECTED.items() for key in keys if not _is_setting(found.get(key), kind)]
    if wrong:
        raise KaggleError(f"{METADATA.name} has to write out {', '.join(wrong)}; take it back from git.")
    return metadata


def _is_setting(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(_is_setting(item, str) for item in value)
    return isinstance(value, kind) and (kind is bool or (bool(value) and value.isprintable()))


def reference_of(metadata: Mapping[str, Any], username: str = "", slug: str = "") -> str:
    """OWNER/SLUG with the user filled in: `username`, else the one in `id`; raises KaggleError where there is none."""
    owner, _, own_slug = metadata["id"].partition("/")
    owner = username or ("" if owner == "OWNER" else owner)
    if not owner:
        raise KaggleError(f"{METADATA.name} still has OWNER in its id; pass --username, or put your user name there.")
    return "/".join(split_reference(f"{owner}/{slug or own_slug}"))


def title_of(metadata: Mapping[str, Any], slug: str) -> str:
    """A title that Kaggle turns into `slug`; with another one a second kernel appears beside the first."""
    from slugify import slugify

    for title in (metadata["title"], slug.replace("-", " ")):
        if slugify(title) == slug and len(slug) >= 5:
            return title
    raise KaggleError(f"{slug!r} is no slug; expected five or more of a-z, 0-9 and single dashes between them.")


def kernel_text(profile: str = "auto", overrides: Mapping[str, Any] | None = None) -> str:
    """What travels: the kernel notebook of these files with its parameters set, as JSON.

    Raises ConfigError for a wrong setting, KaggleError for what must not travel, BundleError where it is too large.
    """
    overrides = dict(overrides or {})
    load_config("t4" if profile == "auto" else profile, overrides)  # auto: what Kaggle's GPU will make of it
    for key, value in overrides.items():
        if _is_local(key, value):
            raise KaggleError(
                f"{key} is {value}, which lies on this machine; attach it to the kernel as a data set and give its path "
                "below /kaggle/input."
            )
    text = json.dumps(build_kernel(profile, overrides))
    files = ((path.name, path.read_text(encoding="utf-8")) for path in bundled_files())  # base64 hides them in `text`
    for place, content in (("A setting", text), *files):
        if redact(content) != content:
            raise KaggleError(
                f"{place} holds a secret, or what looks like one; take it out: a pushed version cannot be unpushed."
            )
    return text


def _is_local(key: str, value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(
            _is_local(f"{key}.{name}", part)
            for name, part in (value.items() if isinstance(value, dict) else enumerate(value))
        )
    if value is None or str(value).startswith("/kaggle/input/"):
        return False
    if key.endswith(".path") or key == "hardware.accelerate_config":
        return True
    return key in ("model.name", "export.base") and is_there(expand_home(str(value), key))


def submission(
    metadata: Mapping[str, Any],
    reference: str,
    text: str,
    run: bool = True,
    hours: float | None = None,
    sources: tuple[str, ...] = (),
) -> Submission:
    """What to push as `reference`; `run` False only saves, `sources` are kernels whose output is attached too."""
    filled = {
        **metadata,
        "id": reference,
        "title": title_of(metadata, split_reference(reference)[1]),
        "kernel_sources": list(dict.fromkeys([*metadata["kernel_sources"], *sources])),
    }
    return Submission(filled, text, hours, run)


def session_hours(config: Config) -> float | None:
    """When Kaggle shall end the session: an hour after the run would end itself; None leaves it to Kaggle."""
    hours = config.hardware.max_hours
    return hours + _GRACE_HOURS if hours else None


def push(kaggle: Kaggle, what: Submission) -> tuple[int | None, str]:
    """(version, address) of what was sent; raises KaggleError where Kaggle took it in part or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        what.write(Path(folder))
        answer = kaggle.push(Path(folder), what.reference, what.hours, what.run)
    if answer.error:
        raise KaggleError(f"Kaggle did not take the push: {answer.error}")
    refused = {
        "data sets": answer.invalid_dataset_sources,
        "kernels": answer.invalid_kernel_sources,
        "competitions": answer.invalid_competition_sources,
        "models": answer.invalid_model_sources,
        "tags": answer.invalid_tags,
    }
    url = answer.url or page(what.reference)
    if any(refused.values()):
        names = "; ".join(f"{kind} {', '.join(values)}" for kind, values in refused.items() if values)
        raise KaggleError(
            f"Kaggle made version {answer.version_number} of {what.reference} without what was to be attached ({names}); stop it "
            f"at {url}, check those names in {METADATA.name}, and push again."
        )
    return answer.version_number, url


def wait(
    kaggle: Kaggle, reference: str, console: Console, interval_s: float = 30.0, just_pushed: bool = False
) -> tuple[str, str]:
    """(state, message) once the kernel's session has ended; a live line until then.

    A session that was never seen at work is believed to have ended only at the third answer, and with `just_pushed`
    never: after a push, Kaggle can show the version before for minutes. Raises InfrastructureError where Kaggle stays
    silent, or shows no new session.
    """
    started, before, silent, ended, seen_at_work = time.monotonic(), "", 0, 0, False
    with console.status(reference) as live:
        while True:
            state, message = "UNKNOWN", ""
            try:
                state, message = kaggle.status(reference)
            except InfrastructureError:
                if silent >= _UNKNOWN_STATES:
                    raise
            silent = silent + 1 if state == "UNKNOWN" else 0
            passed = time.monotonic() - started
            line = f"{reference}: {readable(state)} after {passed / 60:.0f} min"
            live.update(line)
            if state != before:
                console.print(line, highlight=False, soft_wrap=True)
            before = state
            ended = ended + 1 if state in FINISHED else 0
            seen_at_work = seen_at_work or state in ("QUEUED", "RUNNING")
            if ended and (seen_at_work or (ended >= 3 and not just_pushed)):
                return state, message
            if just_pushed and not seen_at_work and passed > _START_S:
                raise InfrastructureError(
                    f"Kaggle took the push, but shows no queued or running session of {reference} after "
                    f"{_START_S / 60:.0f} min (the last state: {readable(state)}); look at {page(reference)}."
                )
            time.sleep(interval_s)


def readable(state: str) -> str:
    """`cancel acknowledged` of CANCEL_ACKNOWLEDGED."""
    return state.replace("_", " ").lower()
