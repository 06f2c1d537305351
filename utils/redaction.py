"""Secrets kept out of what is printed, raised and written down: in a notebook's kernel and in every process of ours.

Values are hidden where they leave, not where they are used: a library that puts a token into its exception's text, a
traceback, a log line or a file of ours tells no more than that there was one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from utils.notebook import notebook_shell
from utils.secrets import KAGGLE_NAMES, NAMES, secrets_at_hand

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
