"""Kaggle's API through Kaggle's own package, with what that package lacks: a limit to silence, and another try."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tenacity

from utils.errors import InfrastructureError, ServiceError, UserError
from utils.files import relative_name

ATTEMPTS = 6
TIMEOUT_S = 120  # the package sets none: a connection that fell silent would be waited for without end
SETTINGS = "https://www.kaggle.com/settings"
FINISHED = ("complete", "error", "cancel acknowledged")
_TURNED_AWAY = 429  # for its rate: the server certainly did nothing
_OWNER = "; check the kernel's name and its owner"
_HINTS = {401: f"; make a new token at {SETTINGS}", 403: _OWNER, 404: _OWNER}


class Kaggle:
    """A client that signs in when first asked, or raises ServiceError; `log` gets a line for each new try."""

    def __init__(self, log: Callable[[str], None] = print):
        self.log = log

    @cached_property
    def _api(self) -> Any:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):  # and a page of help
            api = repeat("signing in", _sign_in, self.log)
            if api.get_config_value("username"):
                return api
        where = f"make a token at {SETTINGS} and put it into ~/.kaggle/access_token"
        raise ServiceError(f"There are no Kaggle credentials, or they are no longer valid; {where}.")

    @property
    def username(self) -> str:
        return self._api.get_config_value("username")

    def push(self, folder: Path, reference: str, hours: float | None = None, run: bool = True) -> Any:
        """`kaggle kernels push`; repeated only where turned away for its rate: else it may have arrived."""
        from kagglesdk.kernels.types.kernels_api_service import ApiSaveKernelRequest
        from kagglesdk.kernels.types.kernels_enums import KernelExecutionType

        request, seconds = ApiSaveKernelRequest(), str(round(hours * 3600)) if hours else None
        action = partial(self._api.kernels_push, str(folder), seconds)
        if not run:  # kaggle 2.2.5 has a parameter for that
            request.kernel_execution_type = KernelExecutionType.QUICK_SAVE
        try:
            with patch("kaggle.api.kaggle_api_extended.ApiSaveKernelRequest", lambda: request):
                return repeat("the push", action, self.log, lambda error: status_of(error) == _TURNED_AWAY)
        except InfrastructureError as error:
            unsure = f"Whether the push arrived is not known: look at {page(reference)} before you push again."
            raise InfrastructureError(f"{error} {unsure}") from None

    def status(self, reference: str) -> tuple[str, str]:
        """(state, message) of a kernel's last session: queued, running, complete, error, cancel acknowledged, …"""
        answer = repeat("get kernel session status", partial(self._api.kernels_status, reference), self.log)
        return answer.status.name.replace("_", " ").lower(), answer.failure_message or ""

    def output(self, reference: str, folder: Path, pattern: str | None = None) -> None:
        """Fetch the last session's log, and files that match `pattern`; none whose name points outside."""

        def is_wanted(response: Any, file: str, quiet: bool = True) -> bool:
            if relative_name(name := file.removeprefix(f"{folder}/")) is None:
                raise InfrastructureError(f"Kaggle lists an output {name!r}, which points outside; nothing was kept.")
            return True

        with patch.object(self._api, "download_needed", is_wanted):
            action = partial(self._api.kernels_output, reference, str(folder), pattern, page_size=100)
            repeat("fetching the output", action, self.log)


def _sign_in() -> Any:
    from kaggle.api.kaggle_api_extended import KaggleApi

    api = KaggleApi()
    api.authenticate()
    return api


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an exception carries, None without an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def passes(error: BaseException | None) -> bool:
    """Whether it is worth another try: rate limits, 5xx, broken connections, and an answer that is no JSON."""
    import requests

    if status := status_of(error):
        return status == _TURNED_AWAY or status >= 500
    broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, ConnectionError)
    return isinstance(error, (*broken, json.JSONDecodeError))


def repeat(what: str, action: Callable[[], Any], log: Callable[[str], None], again: Callable = passes) -> Any:
    """The result of `action`, tried again while `again` holds; raises ServiceError or InfrastructureError."""

    def announce(state: tenacity.RetryCallState) -> None:
        trouble, seconds = describe(state.outcome.exception()), state.next_action.sleep
        log(f"{what}: {trouble}; trying again in {seconds:.0f} s ({state.attempt_number}/{ATTEMPTS}).")

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(initial=1, max=60, jitter=1),
        retry=tenacity.retry_if_exception(again),
        before_sleep=announce,
        reraise=True,
    )
    try:
        with _strict_requests():
            return retrying(action)
    except UserError:
        raise
    except Exception as error:
        raise _explain(error, what) from None


@contextlib.contextmanager
def _strict_requests() -> Iterator[None]:
    """Every request ends in time, and an error page is an error: kaggle 2.2.4 keeps it as the file asked for."""
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send

    def send_strictly(adapter: HTTPAdapter, request: Any, **settings: Any) -> Any:
        answer = send(adapter, request, **{**settings, "timeout": settings.get("timeout") or TIMEOUT_S})
        answer.raise_for_status()
        return answer

    with patch.object(HTTPAdapter, "send", send_strictly):
        yield


def describe(error: BaseException | None) -> str:
    """Status and the server's own message, which the package hides where it is nested."""
    status, message = status_of(error), None
    if status is None:
        return type(error).__name__
    with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):
        body = error.response.json()
        message = body.get("message") or body["error"]["message"]
    return f"{status}: {message}" if message else str(status)


def _explain(error: BaseException, what: str) -> UserError:
    """One sentence for what requests or Kaggle's package raised."""
    if isinstance(error, ValueError) and status_of(error.__context__):
        error = error.__context__  # the package turns a 403 into a guess of its own
    status, reason = status_of(error), describe(error)
    if passes(error):
        return InfrastructureError(f"Kaggle could not be reached for {what} ({reason}); try again later.")
    if status is not None:
        return ServiceError(f"Kaggle refused {what} ({reason}){_HINTS.get(status, '')}.")
    if isinstance(error, ValueError):
        return ServiceError(f"Kaggle's client refused {what}: {error}")
    found = f"something that its package does not understand ({type(error).__name__}: {error})"
    return InfrastructureError(f"Kaggle answered {what} with {found}.")


def split_reference(reference: str) -> tuple[str, str]:
    """("you", "slug") of "you/slug"; raises ServiceError for anything else."""
    owner, sign, slug = reference.partition("/")
    if not (owner and sign and slug) or "/" in slug:
        raise ServiceError(f"{reference!r} is no kernel; expected OWNER/SLUG, as in the kernel's address.")
    return owner, slug


def page(reference: str) -> str:
    """The kernel's address for a browser."""
    return f"https://www.kaggle.com/code/{reference}"
