"""Push the kernel notebook to Kaggle: look at what would travel, send it, read the answer, wait for the end."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from utils.config import expand_home, load_config
from utils.errors import InfrastructureError, KaggleError
from utils.files import is_there, parse_json
from utils.kaggle.api import FINISHED, Kaggle, page, split_reference
from utils.kaggle.bundle import BUNDLE_COMMAND, KERNEL, MAXIMUM_BYTES, check_kernel, with_parameters
from utils.kaggle.kernel_schema import KernelMetadata, Notebook
from utils.project import ROOT
from utils.schema import Config
from utils.secrets import known_values

METADATA = ROOT / "kernel-metadata.json"
_GRACE_HOURS = 1.0  # between the run's own end and the one that Kaggle enforces: saving, exports
_UNKNOWN_STATES = 10  # in a row, before waiting is given up
_START_S = 600.0  # after a push, until its session has to be seen queued or running


@dataclass(frozen=True)
class Pushed:
    """A version that Kaggle took."""

    reference: str
    version: int | None
    url: str


def read_metadata() -> dict[str, Any]:
    """kernel-metadata.json; raises KaggleError where a switch is not written out (the package's defaults change)."""
    try:
        metadata = parse_json(METADATA.read_text(encoding="utf-8"))
        KernelMetadata.model_validate(metadata)
    except ValidationError as error:
        wrong = dict.fromkeys(
            str(problem["loc"][0]) if problem["loc"] else "its settings" for problem in error.errors()
        )
        raise KaggleError(f"{METADATA.name} has to write out {', '.join(wrong)}; take it back from git.") from None
    except (OSError, ValueError) as error:
        raise KaggleError(f"{METADATA} cannot be read ({error}); take it back from git.") from None
    return metadata


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
    """What travels: kaggle_kernel.ipynb with its parameters set, serialised as the Kaggle package does, and checked.

    Raises BundleError where it is out of date, ConfigError for a wrong setting, KaggleError for what must not travel.
    """
    check_kernel()
    overrides = dict(overrides or {})
    load_config("t4" if profile == "auto" else profile, overrides)  # auto: what Kaggle's GPU will make of it
    for key, value in _leaves(overrides):
        if _is_local(key, value):
            raise KaggleError(
                f"{key} is {value}, which lies on this machine; attach it to the kernel as a data set and give its path "
                "below /kaggle/input."
            )
    notebook = json.loads(KERNEL.read_text(encoding="utf-8"))
    given = {"PROFILE": profile, "OVERRIDES": overrides}
    notebook = with_parameters(notebook, {name: value for name, value in given.items() if value not in ("auto", {})})
    text = json.dumps(notebook)
    check_text(text)
    return text


def _is_local(key: str, value: Any) -> bool:
    if str(value).startswith("/kaggle/input/") or value is None:
        return False
    if key.endswith(".path") or key == "hardware.accelerate_config":
        return True
    return key in ("model.name", "export.base") and is_there(expand_home(str(value), key))


def _leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value below `values`; a list's items are key[0], key[1], …"""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _leaves(value, f"{key}[{number}]")
    else:
        yield key, values


def check_text(text: str) -> None:
    """Raise KaggleError for a notebook that Kaggle would refuse, or that carries more than its author wrote."""
    try:
        notebook = parse_json(text)
        Notebook.model_validate(notebook)
    except ValueError as error:
        reason = "its cells are not those of a notebook" if isinstance(error, ValidationError) else error
        raise KaggleError(
            f"What would be sent is no notebook ({reason}); run {BUNDLE_COMMAND} to write it anew."
        ) from None
    remedy = f"run {BUNDLE_COMMAND} to write it anew."
    if len(text) >= MAXIMUM_BYTES:
        raise KaggleError(
            f"The notebook has {len(text):,} bytes as Kaggle counts; expected less than {MAXIMUM_BYTES:,}."
        )
    kernel = notebook["metadata"].get("kernelspec")
    if not isinstance(kernel, dict) or not kernel.get("name"):
        raise KaggleError(f"The notebook names no kernel (kernelspec), and Kaggle runs none without; {remedy}")
    if "papermill" in notebook["metadata"]:
        raise KaggleError(f"The notebook was executed by papermill and carries its parameters; {remedy}")
    for number, cell in enumerate(notebook["cells"], start=1):
        tags = cell.get("metadata", {}).get("tags", [])
        if "injected-parameters" in tags or "papermill" in cell.get("metadata", {}):
            raise KaggleError(f"Cell {number} holds injected parameters; {remedy}")
        if cell.get("outputs") or cell.get("execution_count"):
            raise KaggleError(f"Cell {number} holds executed output; {remedy}")
    for name, value in known_values().items():
        if value in text:
            raise KaggleError(
                f"The notebook holds the value of {name}; take it out: a pushed version cannot be unpushed."
            )
    found = re.search(r"\bhf_[A-Za-z0-9]{20,}", text)
    if found:
        raise KaggleError("The notebook or a setting holds what looks like a Hugging Face token; take it out.")


def build_request(
    metadata: Mapping[str, Any],
    reference: str,
    text: str,
    run: bool = True,
    hours: float | None = None,
    sources: tuple[str, ...] = (),
) -> Any:
    """The request of the Kaggle package, field by field what `kaggle kernels push` sends.

    `run` False saves the version without running it; `hours` ends the session; `sources` are kernels whose output is
    attached beside those in the metadata.
    """
    from kagglesdk.kernels.types.kernels_api_service import ApiSaveKernelRequest
    from kagglesdk.kernels.types.kernels_enums import KernelExecutionType

    request = ApiSaveKernelRequest()
    request.slug, request.new_title = reference, title_of(metadata, reference.split("/")[1])
    request.text, request.language, request.kernel_type = text, metadata["language"], metadata["kernel_type"]
    request.is_private, request.enable_internet = metadata["is_private"], metadata["enable_internet"]
    request.enable_gpu, request.enable_tpu = metadata["enable_gpu"], metadata["enable_tpu"]
    request.machine_shape = metadata["machine_shape"]
    request.dataset_data_sources = list(metadata["dataset_sources"])
    request.kernel_data_sources = list(dict.fromkeys([*metadata["kernel_sources"], *sources]))
    request.competition_data_sources = list(metadata["competition_sources"])
    request.model_data_sources = list(metadata["model_sources"])
    request.category_ids = list(metadata.get("keywords", []))
    if hours:
        request.session_timeout_seconds = round(hours * 3600)
    if not run:
        request.kernel_execution_type = KernelExecutionType.QUICK_SAVE
    return request


def session_hours(config: Config) -> float | None:
    """When Kaggle shall end the session: an hour after the run would end itself; None leaves it to Kaggle."""
    hours = config.hardware.max_hours
    return hours + _GRACE_HOURS if hours else None


def body_of(request: Any) -> dict[str, Any]:
    """The JSON body, as kagglesdk sends it."""
    return request.__class__.to_dict(request)


def describe_request(request: Any) -> str:
    """Every field that would be sent; the notebook's text by size, digest and the first line of each cell."""
    body = body_of(request)
    text = body.pop("text")
    lines = [f"{key}: {json.dumps(value)}" for key, value in body.items()]
    lines.append(f"text: {len(text):,} of {MAXIMUM_BYTES:,} bytes, sha256 {hashlib.sha256(text.encode()).hexdigest()}")
    for number, cell in enumerate(json.loads(text)["cells"], start=1):
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            lines += [f"  cell {number}: {line}" for line in source.splitlines() if _is_assignment(line)]
        else:
            lines.append(
                f"  cell {number}: {cell['cell_type']}, {len(source):,} characters: {source.partition(chr(10))[0]}"
            )
    return "\n".join(lines)


def _is_assignment(line: str) -> bool:
    try:
        return any(isinstance(statement, ast.Assign) for statement in ast.parse(line).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a part of something longer
        return False


def push(kaggle: Kaggle, request: Any) -> Pushed:
    """Send it and read the answer; raises KaggleError where Kaggle took it in part or not at all."""
    answer = kaggle.save_kernel(request)
    if answer.error:
        raise KaggleError(f"Kaggle did not take the push: {answer.error}")
    refused = {
        "data sets": answer.invalid_dataset_sources,
        "kernels": answer.invalid_kernel_sources,
        "competitions": answer.invalid_competition_sources,
        "models": answer.invalid_model_sources,
        "tags": answer.invalid_tags,
    }
    pushed = Pushed(request.slug, answer.version_number, answer.url or page(request.slug))
    if any(refused.values()):
        words = "; ".join(f"{name} {', '.join(values)}" for name, values in refused.items() if values)
        raise KaggleError(
            f"Kaggle made version {pushed.version} of {request.slug} without what was to be attached ({words}); stop it at "
            f"{pushed.url}, check those names in {METADATA.name}, and push again."
        )
    return pushed


def wait(
    kaggle: Kaggle, reference: str, console: Console, interval_s: float = 30.0, just_pushed: bool = False
) -> tuple[str, str]:
    """(state, message) once the kernel's session has ended; a live line until then.

    A session that was never seen at work is believed to have ended only at the third answer, and with `just_pushed`
    never: after a push, Kaggle can be telling of the version before for minutes. Raises InfrastructureError where Kaggle
    stays silent, or tells of no new session.
    """
    started, before, silent, ended, seen_at_work = time.monotonic(), "", 0, 0, False
    live = console.status("") if console.is_terminal else None
    if live:
        live.start()
    try:
        while True:
            try:
                state, message = kaggle.status(reference)
                silent = 0
            except InfrastructureError:
                silent += 1
                if silent >= _UNKNOWN_STATES:
                    raise
                state, message = "UNKNOWN", ""
            minutes = (time.monotonic() - started) / 60
            line = f"{reference}: {state.replace('_', ' ').lower()} after {minutes:.0f} min"
            if live:
                live.update(line)
            elif state != before:
                console.print(line, highlight=False, soft_wrap=True)
            before = state
            ended = ended + 1 if state in FINISHED else 0
            seen_at_work = seen_at_work or state in ("QUEUED", "RUNNING")
            if ended and (seen_at_work or (ended >= 3 and not just_pushed)):
                return state, message
            if just_pushed and not seen_at_work and time.monotonic() - started > _START_S:
                raise InfrastructureError(
                    f"Kaggle took the push, but shows no queued or running session of {reference} after "
                    f"{_START_S / 60:.0f} min (its last word: {state.replace('_', ' ').lower()}); look at {page(reference)}."
                )
            time.sleep(interval_s)
    finally:
        if live:
            live.stop()
