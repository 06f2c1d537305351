"""Tries again, ever more slowly, where that helps; one place for what Kaggle and the Hub have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import tenacity

from utils.errors import UserError

Answer = TypeVar("Answer")
ATTEMPTS = 6
_growing = tenacity.wait_exponential_jitter(initial=1, max=60, jitter=1)


def repeat(
    action: Callable[[], Answer],
    again: Callable[[BaseException], bool],
    explain: Callable[[Exception, str], UserError],
    what: str,
    say: Callable[[str], None],
) -> Answer:
    """The result of `action`, tried up to ATTEMPTS times while `again` holds for its exception.

    A server's Retry-After is honoured, up to two minutes. `say` gets a line before each further try. Any exception that is
    no UserError is raised as what `explain` makes of it.
    """

    def tell(state: tenacity.RetryCallState) -> None:
        trouble = describe(state.outcome.exception())
        say(f"{what}: {trouble}; trying again in {state.next_action.sleep:.0f} s ({state.attempt_number}/{ATTEMPTS}).")

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=_pause,
        retry=tenacity.retry_if_exception(again),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return retrying(action)
    except UserError:
        raise
    except Exception as error:
        raise explain(error, what) from None


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds: what the server asks for, or growing from one second."""
    response = getattr(state.outcome.exception(), "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), 120.0) if asked.replace(".", "", 1).isdigit() else _growing(state)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an exception of requests, httpx or huggingface_hub carries, None without an answer."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def describe(error: BaseException | None) -> str:
    """Status and the server's own message, also where a client library hides it because it is nested."""
    status = status_of(error)
    if status is None:
        return type(error).__name__
    try:
        body = json.loads(error.response.text)
    except ValueError:
        body = {}
    body = body if isinstance(body, dict) else {}
    nested = body.get("error")
    message = nested.get("message") if isinstance(nested, dict) else body.get("message") or nested
    return f"{status}: {message}" if message else str(status)
