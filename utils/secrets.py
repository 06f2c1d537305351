"""Secrets, read by name (Kaggle, Colab, environment, .env, cached login, in that order) and hidden in all that leaves."""

import netrc
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from utils.files import read_json
from utils.hardware import hub_cache
from utils.processes import find_driver
from utils.progress import notebook_shell
from utils.project import ROOT

NAMES = {"HF_TOKEN": ("HF_TOKEN", "HUGGINGFACE_TOKEN"), "WANDB_API_KEY": ("WANDB_API_KEY", "wandb")}
_ALIASES = [*(alias for aliases in NAMES.values() for alias in aliases), "KAGGLE_KEY", "KAGGLE_API_TOKEN"]
_SHORTEST = 8  # a shorter value would be found in ordinary words
# What a token of these services looks like, also where it is not ours; a bare 40 or 32 hex digits may be a commit.
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}|\bKGAT_[A-Za-z0-9]{16,}|\bwandb_v\d+_[A-Za-z0-9_]{20,}"
    r"|(?i:(?<=bearer )|(?<=authorization: basic ))(?=[A-Za-z+/_.-]*[0-9=])[A-Za-z0-9+/_.=-]{16,}"
)
_found: set[str] = set()


@dataclass(frozen=True)
class Secret:
    """A secret's value, hidden from repr, and where it was found; `source` says why where there is none."""

    name: str
    source: str
    value: str | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return self.value is not None


def find_secret(name: str) -> Secret:
    """Look a secret up by its name in `NAMES` and the aliases there; never raises, as a pushed run has none."""
    remarks = []
    for source, value in _ask_stores(name):
        value = (value or "").strip()
        if value and value.isascii() and value.isprintable():
            _found.add(value)
            return Secret(name, source, value)
        if value:  # neither a header nor the environment of a process takes it
            remarks.append(f"{source}: a value with characters that no token has")
        elif ": " in source:
            remarks.append(source)
    return Secret(name, "; ".join(dict.fromkeys(remarks)) or "absent")


def _ask_stores(name: str) -> Iterator[tuple[str, str | None]]:
    """(where, value) of each store in order; (the store and its trouble, None) where a platform raised."""
    if find_driver() is None:  # which has asked already, where the notebook is open, and handed on what it found
        for store, look in _platforms().items():
            for alias in NAMES[name]:
                try:
                    yield f"{store} ({alias})", look(alias)
                except Exception as error:  # a label that does not exist raises; a message can hold the value
                    yield f"{store}: none ({type(error).__name__})", None
    for store, values in (("environment", os.environ), (".env", _dotenv())):
        for alias in NAMES[name]:
            yield f"{store} ({alias})", values.get(alias)
    yield "cached login", _from_cached_login(name)


def _platforms() -> dict[str, Callable[[str], str | None]]:
    """{store: what reads a label's value there} of the platform that this is."""
    stores = {}
    with suppress(ImportError):
        from kaggle_secrets import UserSecretsClient

        stores["Kaggle Secrets"] = lambda label: UserSecretsClient().get_secret(label)
    with suppress(ImportError):
        from google.colab import userdata

        stores["Colab secrets"] = userdata.get
    return stores


def _dotenv() -> dict[str, str | None]:
    """The .env beside the checkout, and the one in the current directory, which wins; nothing of it is exported."""
    from dotenv import dotenv_values

    values: dict[str, str | None] = {}
    for file in (ROOT / ".env", Path.cwd() / ".env"):
        with suppress(OSError, UnicodeDecodeError):
            values |= dotenv_values(file, interpolate=False)
    return values


def _from_cached_login(name: str) -> str | None:
    with suppress(OSError, UnicodeDecodeError, netrc.NetrcParseError):
        if name == "HF_TOKEN":
            return (hub_cache() / "token").read_text(encoding="utf-8")
        logins = netrc.netrc()
        for host in ("api.wandb.ai", "api.forge.coreweave.com"):  # the default server moved with wandb 0.31
            if found := logins.authenticators(host):
                return found[2]
    return None


def share_secrets(*names: str) -> list[Secret]:
    """Find the named secrets, all by default, and hand them on in the environment to libraries and processes of ours."""
    secrets = [find_secret(name) for name in names or NAMES]
    os.environ.update({secret.name: secret.value for secret in secrets if secret.value})
    return secrets


def redact(text: str) -> str:
    """`text` with every known secret, and everything in the shape of one, replaced by `***`."""
    known = {value.strip() for value in (*map(os.environ.get, _ALIASES), *_found, *_on_disk()) if value}
    known = {value for value in known if len(value) >= _SHORTEST}
    for value in sorted(known | {quote(value, safe="") for value in known}, key=len, reverse=True):
        text = text.replace(value, "***")
    return SHAPES.sub("***", text)


@cache
def _on_disk() -> frozenset[str]:
    """In .env and in the cached logins; read once, since this is asked for every line that is printed."""
    kaggle = Path(os.environ.get("KAGGLE_CONFIG_DIR") or Path.home() / ".kaggle")
    values = [*map(_dotenv().get, _ALIASES), *map(_from_cached_login, NAMES)]
    with suppress(OSError, UnicodeDecodeError):
        values.append((kaggle / "access_token").read_text(encoding="utf-8"))
    with suppress(OSError, ValueError, KeyError, TypeError):
        values.append(str(read_json(kaggle / "kaggle.json")["key"]))
    return frozenset(value for value in values if value)


class _Redacting:
    """A text stream before another one; everything but writing is the other's."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hide_secrets() -> None:
    """From here on this process shows no secret: what it prints, its tracebacks, and in a notebook all that cells send."""
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
    return [_clean(value) for value in content] if isinstance(content, list | tuple) else content
