"""Kaggle's API through Kaggle's own package, with what that package lacks: a limit to silence, and another try.

Its command line ends with status 0 for pushes and runs that failed, so its methods are called and their answers read.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import tenacity

from utils.errors import InfrastructureError, KaggleError, UserError
from utils.files import relative_name

Answer = TypeVar("Answer")
ATTEMPTS = 6
TIMEOUT_S = 120  # the package sets none: a connection that fell silent would be waited for without end
_OWNER = "; check the kernel's name and its owner"
SETTINGS = "https://www.kaggle.com/settings"
FINISHED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
_growing = tenacity.wait_exponential_jitter(initial=1, max=60, jitter=1)


class Kaggle:
    """A signed-in client. `log` gets one line for everything that is tried again.

    Raises KaggleError where there are no credentials or Kaggle does not accept them.
    """

    def __init__(self, log: Callable[[str], None] = print):
        self.log = log
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # a page of help where it cannot sign in
                self._api = self._call("signing in", _sign_in)
            self.username: str = self._api.get_config_value("username") or ""
        except ModuleNotFoundError:
            raise KaggleError("The package kaggle is not installed; pip install -r requirements-cpu.txt.") from None
        except SystemExit:
            self.username = ""
        if not self.username:
            raise KaggleError(
                f"There are no Kaggle credentials, or they are no longer valid; make a token at {SETTINGS} and put it "
                "into ~/.kaggle/access_token or KAGGLE_API_TOKEN."
            )

    def push(self, folder: Path, reference: str, hours: float | None = None, run: bool = True) -> Any:
        """Push what `folder` holds, as `kaggle kernels push` does; the answer is the package's own.

        Repeated where Kaggle turned it away for its rate, and for nothing else: a push whose answer is lost may have
        arrived. Raises InfrastructureError then.
        """
        self._api.run_it = run
        seconds = str(round(hours * 3600)) if hours else None
        try:
            return self._call("the push", lambda: self._api.kernels_push(str(folder), seconds), _is_turned_away)
        except InfrastructureError as error:
            raise InfrastructureError(
                f"{error} Whether the push arrived is not known: look at {page(reference)} before you push again."
            ) from None

    def status(self, reference: str) -> tuple[str, str]:
        """(state, message) of a kernel's last session: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_ACKNOWLEDGED, …"""
        answer = self._call("get kernel session status", lambda: self._api.kernels_status(reference))
        return answer.status.name, answer.failure_message or ""

    def output(self, reference: str, folder: Path, pattern: str | None = None) -> None:
        """Fetch the output of a kernel's last session, and its log as SLUG.log; of the files those that match `pattern`.

        Raises InfrastructureError for a file whose name points out of `folder`.
        """
        fetch = self._api.kernels_output
        self._call("fetching the output", lambda: fetch(reference, str(folder), pattern, page_size=100))

    def _call(self, what: str, action: Callable[[], Answer], again: Callable[[BaseException], bool] | None = None):
        with _strict_requests():
            return repeat(action, again or passes, explain, what, self.log)


def _sign_in() -> Any:
    from kaggle.api.kaggle_api_extended import KaggleApi
    from kagglesdk.kernels.types.kernels_enums import KernelExecutionType

    class Client(KaggleApi):
        """Saves without running (kaggle 2.2.5 has a parameter for that), and refuses names that point elsewhere."""

        run_it = True

        def build_kaggle_client(self) -> Any:
            client = super().build_kaggle_client()
            service = client.kernels.kernels_api_client
            save, list_output = service.save_kernel, service.list_kernel_session_output

            def save_as_asked(request: Any) -> Any:
                if not self.run_it:
                    request.kernel_execution_type = KernelExecutionType.QUICK_SAVE
                return save(request)

            def list_checked(request: Any) -> Any:
                answer = list_output(request)
                require_names_below(file.file_name for file in answer.files or [])
                return answer

            service.save_kernel, service.list_kernel_session_output = save_as_asked, list_checked
            return client

    api = Client()
    api.authenticate()
    return api


def require_names_below(names: Iterator[str]) -> None:
    """Raise InfrastructureError for the first name that would be written outside of the folder it is fetched into."""
    for name in names:
        if relative_name(name) is None:
            raise InfrastructureError(
                f"Kaggle lists an output called {name!r}, which points outside or is no file name; nothing was fetched."
            )


@contextlib.contextmanager
def _strict_requests() -> Iterator[None]:
    """Within it every request ends in time, and an error page is an error: kaggle 2.2.4 keeps it as the file asked for."""
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send

    def send_strictly(adapter: HTTPAdapter, request: Any, **settings: Any) -> Any:
        answer = send(adapter, request, **{**settings, "timeout": settings.get("timeout") or TIMEOUT_S})
        answer.raise_for_status()
        return answer

    with patch.object(HTTPAdapter, "send", send_strictly):
        yield


def repeat(
    action: Callable[[], Answer],
    again: Callable[[BaseException], bool],
    explain: Callable[[Exception, str], UserError],
    what: str,
    log: Callable[[str], None],
) -> Answer:
    """The result of `action`, tried up to ATTEMPTS times while `again` holds for its exception.

    A server's Retry-After is honoured, up to two minutes. Any exception that is no UserError is raised as what `explain`
    makes of it.
    """

    def announce(state: tenacity.RetryCallState) -> None:
        trouble = describe(state.outcome.exception())
        log(f"{what}: {trouble}; trying again in {state.next_action.sleep:.0f} s ({state.attempt_number}/{ATTEMPTS}).")

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=_pause,
        retry=tenacity.retry_if_exception(again),
        before_sleep=announce,
        reraise=True,
    )
    try:
        return retrying(action)
    except (UserError, ModuleNotFoundError):
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


def _is_turned_away(error: BaseException) -> bool:
    return status_of(error) == 429  # for its rate: the server certainly did nothing


def passes(error: BaseException) -> bool:
    """Whether it is worth another try: rate limits, 5xx, broken connections, and an answer that is no JSON."""
    import requests

    if status_of(error) is not None and isinstance(error, requests.HTTPError):
        return _is_turned_away(error) or status_of(error) >= 500
    broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, ConnectionError)
    return isinstance(error, (*broken, requests.exceptions.JSONDecodeError, json.JSONDecodeError))


def explain(error: BaseException, what: str) -> KaggleError | InfrastructureError:
    """One sentence for what requests or Kaggle's package raised."""
    if isinstance(error, ValueError) and status_of(error.__context__):
        error = error.__context__  # the package turns a 403 into a guess of its own
    status, reason = status_of(error), describe(error)
    if passes(error):
        return InfrastructureError(f"Kaggle could not be reached for {what} ({reason}); try again later.")
    if status is not None:
        hints = {401: f"; make a new token at {SETTINGS}", 403: _OWNER, 404: _OWNER}
        return KaggleError(f"Kaggle refused {what} ({reason}){hints.get(status, '')}.", status)
    if isinstance(error, ValueError):
        return KaggleError(f"Kaggle's client refused {what}: {error}")
    return InfrastructureError(
        f"Kaggle answered {what} with something that its package does not understand ({type(error).__name__}: {error})."
    )


def split_reference(reference: str) -> tuple[str, str]:
    """("you", "slug") of "you/slug"; raises KaggleError for anything else."""
    owner, sign, slug = reference.partition("/")
    if not (owner and sign and slug) or "/" in slug:
        raise KaggleError(f"{reference!r} is no kernel; expected OWNER/SLUG, as in the kernel's address.")
    return owner, slug


def page(reference: str) -> str:
    """The kernel's address for a browser."""
    return f"https://www.kaggle.com/code/{reference}"
