"""Secrets, read by name: Kaggle, Colab, environment, .env, cached login, in that order. A value is never printed.

A platform raises for everything that is not simply there, each in its own way; here all of it comes to three words:
found, absent (the store answered, and has no such secret) or unreachable (nobody knows).
"""

from __future__ import annotations

import json
import netrc
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from utils.progress import notebook_shell
from utils.project import ROOT

NAMES = {"HF_TOKEN": ("HF_TOKEN", "HUGGINGFACE_TOKEN"), "WANDB_API_KEY": ("WANDB_API_KEY", "wandb")}
SHARED = (
    "SERIES_SECRETS_SHARED"  # set for processes whose parent asked the platform: in Colab they could not ask themselves
)
KAGGLE_NAMES = ("KAGGLE_KEY", "KAGGLE_API_TOKEN")
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
    through Kaggle's API has no secrets and must succeed all the same. What is found is remembered, to be kept out of
    everything that is printed (`secrets_at_hand`).
    """
    secret = _look_up(name)
    if secret.value:
        _found.add(secret.value)
    return secret


def secrets_at_hand() -> set[str]:
    """The values that this process has found so far, and those in .env and the cached logins; no platform is asked."""
    return _found | _on_disk()


@cache
def _on_disk() -> frozenset[str]:
    """Read once: this is asked for every line that is printed."""
    beside = _dotenv()
    values = [beside.get(alias) for aliases in (*NAMES.values(), KAGGLE_NAMES) for alias in aliases]
    values += [_from_cached_login(name) for name in NAMES] + [_kaggle_key(), _kaggle_token()]
    return frozenset(value.strip() for value in values if value)


def _kaggle_key() -> str | None:
    try:
        return str(json.loads((_kaggle_home() / "kaggle.json").read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kaggle_token() -> str | None:
    try:
        return (_kaggle_home() / "access_token").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _kaggle_home() -> Path:
    return Path(os.environ.get("KAGGLE_CONFIG_DIR") or Path.home() / ".kaggle")


def _look_up(name: str) -> Secret:
    remarks: list[str] = []
    unreachable = False
    platforms = () if os.environ.get(SHARED) else (("Kaggle Secrets", _from_kaggle), ("Colab secrets", _from_colab))
    for store, look in platforms:
        value, alias, state, remark = _ask(look, NAMES[name])
        if value:
            return Secret(name, f"{store} ({alias})", value, "found")
        remarks += [f"{store}: {remark}"] if remark else []
        unreachable = unreachable or state == "unreachable"
    for store, values in (("environment", os.environ), (".env", _dotenv())):
        for alias in NAMES[name]:
            value = (values.get(alias) or "").strip()
            if value and not _can_be_sent(value):
                remarks.append(f"{store}: {_ODD}")
            elif value:
                return Secret(name, f"{store} ({alias})", value, "found")
    value = _from_cached_login(name)
    if value and not _can_be_sent(value):
        remarks.append(f"cached login: {_ODD}")
    elif value:
        return Secret(name, "cached login", value, "found")
    return Secret(name, "; ".join(remarks) or "absent", state="unreachable" if unreachable else "absent")


_ODD = "a value with characters that no token has"


def _can_be_sent(value: str) -> bool:
    """In a header and in the environment of a process, neither of which takes everything that a file can hold."""
    return value.isascii() and value.isprintable()


def _ask(look: Callable[[str], str | None], aliases: tuple[str, ...]) -> tuple[str | None, str, State, str]:
    """(value, alias, state, remark) of one platform; a label that does not exist raises there, so each alias is tried."""
    troubles: list[tuple[State, str]] = []
    for alias in aliases:
        try:
            value = (look(alias) or "").strip()
        except Exception as error:  # only its type and what it means may be told: a message can hold the value
            troubles.append(_classify(error))
            continue
        if value and not _can_be_sent(value):
            troubles.append(("unreachable", _ODD))
        elif value:
            return value, alias, "found", ""
    first = troubles[0] if troubles else ("absent", "")
    return None, "", *next((trouble for trouble in troubles if trouble[0] == "unreachable"), first)


def _classify(error: Exception) -> tuple[State, str]:
    """What a platform's exception means; by name, since old and new versions of a platform lack some of the classes."""
    kind = type(error).__name__
    text = str(error)
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
    try:
        from dotenv import dotenv_values
    except ImportError:
        return {}
    values: dict[str, str | None] = {}
    for file in dict.fromkeys((ROOT / ".env", Path.cwd() / ".env")):
        try:
            values |= dotenv_values(file, interpolate=False)
        except (OSError, UnicodeDecodeError):
            continue
    return values


def _from_cached_login(name: str) -> str | None:
    if name == "HF_TOKEN":
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        file = home / "token"
        try:
            return file.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):
            return None
    try:
        logins = netrc.netrc()
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return None
    for host in ("api.wandb.ai", "api.forge.coreweave.com"):  # the default server moved with wandb 0.31
        if logins.authenticators(host):
            return logins.authenticators(host)[2]
    return None


def share_secrets() -> list[Secret]:
    """Ask every store once, here, where the notebook is open, and hand what is found on to the processes started from here."""
    secrets = [find_secret(name) for name in NAMES]
    for secret in secrets:
        if secret.value:
            os.environ[secret.name] = secret.value
    os.environ[SHARED] = "1"
    return secrets


def share_hub_token() -> Secret:
    """Put the HF token, where there is one, into the environment that huggingface_hub reads; return its description."""
    secret = find_secret("HF_TOKEN")
    if secret:
        os.environ["HF_TOKEN"] = secret.value
    return secret


def known_values() -> dict[str, str]:
    """{name: value} of the secrets that are at hand here, so that a check can look for them in what is about to leave."""
    values = {name: find_secret(name).value for name in NAMES}
    beside = _dotenv()
    for name in KAGGLE_NAMES:
        values[name] = os.environ.get(name) or beside.get(name)
    return {name: value for name, value in values.items() if value and len(value) >= 8}


HIDDEN = "***"
_SHORTEST = 8  # a shorter value would be found in ordinary words
# What a token of these services looks like, also where it is not ours; a bare 40 or 32 hex digits may be a commit.
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}|\bKGAT_[A-Za-z0-9]{16,}|\bwandb_v\d+_[A-Za-z0-9_]{20,}"
    r"|(?i:(?<=bearer )|(?<=authorization: basic ))(?=[A-Za-z+/_.-]*[0-9=])[A-Za-z0-9+/_.=-]{16,}"
)


def redact(text: str) -> str:
    """`text` with every known secret, and everything in the shape of one, replaced by `***`."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, text)


def _values() -> list[str]:
    """The secrets that this process can know, in every form in which they are sent; the longest first."""
    named = [os.environ.get(alias) for aliases in (*NAMES.values(), KAGGLE_NAMES) for alias in aliases]
    known = {value.strip() for value in (*named, *secrets_at_hand()) if value}
    known = {value for value in known if len(value) >= _SHORTEST}
    return sorted(known | {quote(value, safe="") for value in known}, key=len, reverse=True)


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
