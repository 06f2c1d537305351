"""Secrets, read by name (Kaggle, Colab, environment, .env, cached login, in that order) and hidden in all that leaves.

A platform raises for everything that is not simply there, each in its own way; here all of it comes to three words: found,
absent (the store answered, and has no such secret) or unreachable (nobody knows). Values are hidden where they leave, not
where they are used: a library that puts a token into its exception's text tells no more than that there was one.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from utils.processes import find_driver
from utils.progress import notebook_shell
from utils.project import ROOT

NAMES = {"HF_TOKEN": ("HF_TOKEN", "HUGGINGFACE_TOKEN"), "WANDB_API_KEY": ("WANDB_API_KEY", "wandb")}
KAGGLE_NAMES = ("KAGGLE_KEY", "KAGGLE_API_TOKEN")
HIDDEN = "***"
_SHORTEST = 8  # a shorter value would be found in ordinary words
_ODD = "a value with characters that no token has"
# What a token of these services looks like, also where it is not ours; a bare 40 or 32 hex digits may be a commit.
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}|\bKGAT_[A-Za-z0-9]{16,}|\bwandb_v\d+_[A-Za-z0-9_]{20,}"
    r"|(?i:(?<=bearer )|(?<=authorization: basic ))(?=[A-Za-z+/_.-]*[0-9=])[A-Za-z0-9+/_.=-]{16,}"
)
_found: set[str] = set()
State = Literal["found", "absent", "unreachable"]


@dataclass(frozen=True)
class Secret:
    """A secret's value, hidden from repr, and where it was found; `source` says why where there is none."""

    name: str
    source: str
    value: str | None = field(default=None, repr=False)
    state: State = "absent"

    def __bool__(self) -> bool:
        return self.value is not None


def find_secret(name: str) -> Secret:
    """Look a secret up by its name in `NAMES` and the aliases there.

    Never raises: a store that cannot be reached does not hide the next one, and `source` says so, because a run pushed
    through Kaggle's API has no secrets and must succeed all the same. What is found is kept out of all that is printed.
    """
    answers = []
    for answer in _ask_stores(name):
        if answer.value:
            _found.add(answer.value)
            return answer
        answers.append(answer)
    remarks = "; ".join(answer.source for answer in answers) or "absent"
    return Secret(name, remarks, state="unreachable" if any(a.state == "unreachable" for a in answers) else "absent")


def _ask_stores(name: str) -> Iterator[Secret]:
    """What each store says of a secret, in order; nothing of those that simply do not have it."""
    if find_driver() is None:  # which has asked already, where the notebook is open, and handed on what it found
        for store, look in (("Kaggle Secrets", _from_kaggle), ("Colab secrets", _from_colab)):
            yield from _ask_platform(name, store, look)
    for store, values in (("environment", os.environ), (".env", _dotenv())):
        for alias in NAMES[name]:
            yield from _judge(name, f"{store} ({alias})", values.get(alias))
    yield from _judge(name, "cached login", _from_cached_login(name))


def _ask_platform(name: str, store: str, look: Callable[[str], str | None]) -> Iterator[Secret]:
    """The value under the first alias that has one; else the most telling trouble. A label that does not exist raises."""
    troubles = []
    for alias in NAMES[name]:
        try:
            answers = list(_judge(name, f"{store} ({alias})", look(alias)))
        except Exception as error:  # only its type and what it means may be told: a message can hold the value
            state, meaning = _classify(error)
            answers = [Secret(name, f"{store}: {meaning}", state=state)]
        if answers and answers[0]:
            yield answers[0]
            return
        troubles += answers
    yield from sorted(troubles, key=lambda answer: answer.state != "unreachable")[:1]


def _judge(name: str, source: str, value: str | None) -> Iterator[Secret]:
    value = (value or "").strip()
    if value and value.isascii() and value.isprintable():
        yield Secret(name, source, value, "found")
    elif value:  # neither a header nor the environment of a process takes it
        store = source.partition(" (")[0]
        yield Secret(name, f"{store}: {_ODD}", state="unreachable" if store.endswith("ecrets") else "absent")


def _classify(error: Exception) -> tuple[State, str]:
    """What a platform's exception means; by name, since old and new versions of a platform lack some of the classes."""
    kind, text = type(error).__name__, str(error)
    if kind == "BackendError":  # Kaggle: one class for a label that is not attached (code 5) and for anything else
        if "'code': 5" in text or "No user secrets exist" in text:
            return "absent", "none attached (a pushed run has none)"
        return "unreachable", "an answer that it does not understand (BackendError)"
    meanings: dict[str, tuple[State, str]] = {
        "CredentialError": ("absent", "this session has no access to secrets"),
        "ValidationError": ("absent", "an empty label"),
        "ConnectionError": ("unreachable", "no connection; is the internet switched on?"),
        "SecretNotFoundError": ("absent", "none of that name"),
        "NotebookAccessError": ("unreachable", "there, but its switch for this notebook is off"),
        "TimeoutException": ("unreachable", "no answer; it is read only where the notebook is open in Colab"),
        "AttributeError": ("unreachable", "no notebook is open in Colab here"),
    }
    return meanings.get(kind, ("unreachable", kind))


def _from_kaggle(label: str) -> str | None:
    try:
        from kaggle_secrets import UserSecretsClient
    except ImportError:
        return None
    return UserSecretsClient().get_secret(label)


def _from_colab(label: str) -> str | None:
    try:
        from google.colab import userdata
    except ImportError:
        return None
    return userdata.get(label)


def _dotenv() -> dict[str, str | None]:
    """The .env beside the checkout, and the one in the current directory, which wins; nothing of it is exported."""
    values: dict[str, str | None] = {}
    with suppress(ImportError):
        from dotenv import dotenv_values

        for file in dict.fromkeys((ROOT / ".env", Path.cwd() / ".env")):
            with suppress(OSError, UnicodeDecodeError):
                values |= dotenv_values(file, interpolate=False)
    return values


def _from_cached_login(name: str) -> str | None:
    if name == "HF_TOKEN":
        return _read_text(Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "token")
    with suppress(OSError, UnicodeDecodeError, netrc.NetrcParseError):
        logins = netrc.netrc()
        for host in ("api.wandb.ai", "api.forge.coreweave.com"):  # the default server moved with wandb 0.31
            if found := logins.authenticators(host):
                return found[2]
    return None


def _read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def share_secrets() -> list[Secret]:
    """Ask every store once, here, where the notebook is open, and hand what is found on to the processes started from here."""
    secrets = [find_secret(name) for name in NAMES]
    os.environ.update({secret.name: secret.value for secret in secrets if secret.value})
    return secrets


def share_hub_token() -> Secret:
    """Put the HF token, where there is one, into the environment that huggingface_hub reads; return its description."""
    secret = find_secret("HF_TOKEN")
    if secret.value:
        os.environ["HF_TOKEN"] = secret.value
    return secret


def known_values() -> dict[str, str]:
    """{name: value} of the secrets that are at hand here, so that a check can look for them in what is about to leave."""
    values = {name: find_secret(name).value for name in NAMES}
    values |= {name: os.environ.get(name) or _dotenv().get(name) for name in KAGGLE_NAMES}
    return {name: value for name, value in values.items() if value and len(value) >= _SHORTEST}


def redact(text: str) -> str:
    """`text` with every known secret, and everything in the shape of one, replaced by `***`."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


def _values() -> list[str]:
    """The secrets that this process can know, in every form in which they are sent; the longest first."""
    named = [os.environ.get(alias) for aliases in (*NAMES.values(), KAGGLE_NAMES) for alias in aliases]
    known = {value.strip() for value in (*named, *_found, *_on_disk()) if value}
    known = {value for value in known if len(value) >= _SHORTEST}
    return sorted(known | {quote(value, safe="") for value in known}, key=len, reverse=True)


@cache
def _on_disk() -> frozenset[str]:
    """In .env and in the cached logins; read once, since this is asked for every line that is printed."""
    beside, kaggle = _dotenv(), Path(os.environ.get("KAGGLE_CONFIG_DIR") or Path.home() / ".kaggle")
    values = [beside.get(alias) for aliases in (*NAMES.values(), KAGGLE_NAMES) for alias in aliases]
    values += [_from_cached_login(name) for name in NAMES] + [_read_text(kaggle / "access_token")]
    with suppress(ValueError, KeyError, TypeError):
        values.append(str(json.loads(_read_text(kaggle / "kaggle.json") or "")["key"]))
    return frozenset(value.strip() for value in values if value)


class _Redacting:
    """A text stream before another one; everything but writing is the other's."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hide_secrets() -> None:
    """From here on this process shows no secret: what it prints, its tracebacks, and in a notebook all that cells send.

    Calling it again changes nothing.
    """
    if hasattr(shell := notebook_shell(), "kernel"):
        _hide_in(shell.kernel.session)
        return
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Redacting):
            setattr(sys, name, _Redacting(stream))


def _hide_in(session: Any) -> None:
    """Let everything that a kernel's session sends pass `redact`: streams, shown objects, results, errors."""
    send = session.send
    if getattr(send, "redacts", False):
        return

    def send_redacted(stream: Any, message: Any, content: Any = None, *rest: Any, **more: Any) -> Any:
        if isinstance(message, dict) and "content" in message:
            message = {**message, "content": _clean(message["content"])}
        return send(stream, message, _clean(content), *rest, **more)

    send_redacted.redacts = True
    session.send = send_redacted


def _clean(content: Any) -> Any:
    """A message's content with its texts redacted; pictures, which are long and hold none, are left as they are."""
    if isinstance(content, str):
        return redact(content)
    if isinstance(content, dict):
        return {key: value if str(key).startswith("image/") else _clean(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_clean(value) for value in content]
    return content
