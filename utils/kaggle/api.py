"""Kaggle's API through Kaggle's own package: who we are, a call that is repeated where that helps, what a kernel does.

The command line of that package ends with status 0 for pushes and runs that failed, so its answers are read here instead.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from utils.errors import InfrastructureError, KaggleError
from utils.kaggle.retry import describe, repeat, status_of

TIMEOUT_S = 120  # kagglesdk sets none: a connection that fell silent would be waited for without end
SETTINGS = "https://www.kaggle.com/settings"
FINISHED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")


class Kaggle:
    """A signed-in client. `say` gets one line for everything that is tried again.

    Raises KaggleError where there are no credentials or Kaggle does not accept them.
    """

    def __init__(self, say: Callable[[str], None] = print):
        self.say = say
        help_text = io.StringIO()
        try:
            with contextlib.redirect_stdout(help_text):  # importing signs in, and prints a page of help where it cannot
                from kaggle.api.kaggle_api_extended import KaggleApi

                self._api = KaggleApi()
                repeat(self._api.authenticate, passes, explain, "signing in", say)
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

    def call(self, method: str, request: Any) -> Any:
        """One request of the kernels service, such as `get_kernel`; repeated with back-off.

        Raises KaggleError with Kaggle's own words where it refuses, InfrastructureError where it cannot be reached.
        """
        return repeat(lambda: self._send(method, request), passes, explain, method.replace("_", " "), self.say)

    def save_kernel(self, request: Any) -> Any:
        """Push. A lost answer is not taken for a lost push: before it is repeated, Kaggle's version number is compared.

        Raises as `call` does, and InfrastructureError where nobody can say whether the push arrived.
        """
        before = self.version(request.slug)

        def push() -> Any:
            try:
                return self._send("save_kernel", request)
            except Exception as error:
                if not passes(error) or was_not_taken(error):
                    raise
                return self._resolve_lost(request.slug, before, error)

        return repeat(push, passes, explain, "the push", self.say)

    def _resolve_lost(self, reference: str, before: int, error: Exception) -> Any:
        """The answer to a push that arrived although its answer did not; raises `error` where it is to be repeated."""
        from kagglesdk.kernels.types.kernels_api_service import ApiSaveKernelResponse

        try:
            now = self.version(reference)
        except InfrastructureError:
            raise InfrastructureError(
                f"The answer to the push was lost ({describe(error)}) and Kaggle cannot be asked whether it arrived; "
                f"look at {page(reference)} before you push again: a second push would run twice."
            ) from None
        if now > before:
            self.say(f"The answer was lost ({describe(error)}), but version {now} has arrived: not pushed again.")
            response = ApiSaveKernelResponse()
            response.ref, response.url, response.version_number = reference, page(reference), now
            return response
        self.say(
            f"The answer was lost ({describe(error)}) and Kaggle still shows version {before}: pushing again. Should Kaggle "
            "only have been slow, there will be two new versions: cancel one."
        )
        raise error

    def version(self, reference: str) -> int:
        """The number of a kernel's newest version; 0 for a kernel that does not exist yet."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        request = ApiGetKernelRequest()
        request.user_name, request.kernel_slug = split_reference(reference)
        try:
            answer = self.call("get_kernel", request)
        except KaggleError as error:
            if error.status in (403, 404):
                return 0
            raise
        return (answer.metadata.current_version_number or 0) if answer.metadata else 0

    def status(self, reference: str) -> tuple[str, str]:
        """(state, message) of a kernel's last session: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_ACKNOWLEDGED, …"""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest

        request = ApiGetKernelSessionStatusRequest()
        request.user_name, request.kernel_slug = split_reference(reference)
        answer = self.call("get_kernel_session_status", request)
        return answer.status.name, answer.failure_message or ""

    def outputs(self, reference: str) -> tuple[dict[str, str], str]:
        """({file name: address}, log) of a kernel's last session, all pages."""
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        files, log, token = {}, "", ""
        while True:
            request = ApiListKernelSessionOutputRequest()
            request.user_name, request.kernel_slug = split_reference(reference)
            request.page_size, request.page_token = 100, token
            answer = self.call("list_kernel_session_output", request)
            files |= {file.file_name: file.url for file in answer.files or []}
            log = log or answer.log or ""
            if not answer.next_page_token or answer.next_page_token == token:
                return files, log
            token = answer.next_page_token

    def _send(self, method: str, request: Any) -> Any:
        with self._client() as client:
            return getattr(client.kernels.kernels_api_client, method)(request)

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        from requests.adapters import HTTPAdapter

        class Bounded(HTTPAdapter):
            def send(self, request, **settings):
                settings["timeout"] = settings.get("timeout") or TIMEOUT_S
                return super().send(request, **settings)

        with self._api.build_kaggle_client() as client:
            for scheme in ("http://", "https://"):
                client.http_client()._session.mount(scheme, Bounded())
            yield client


def passes(error: BaseException) -> bool:
    """Whether it is worth another try: rate limits, 5xx, broken connections, and an answer that is no JSON."""
    import requests

    if status_of(error) is not None and isinstance(error, requests.HTTPError):
        return status_of(error) == 429 or status_of(error) >= 500
    broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, ConnectionError)
    return isinstance(error, (*broken, requests.exceptions.JSONDecodeError, json.JSONDecodeError))


def was_not_taken(error: BaseException) -> bool:
    """Whether the server certainly did nothing: it was never reached, or it turned the request away for its rate."""
    import requests
    from urllib3.exceptions import NewConnectionError

    if isinstance(error, requests.ConnectTimeout):
        return True
    if status_of(error) is not None:
        return status_of(error) == 429
    reason = getattr(error.args[0], "reason", None) if error.args else None
    # A ProxyError alone says nothing: urllib3 calls every break so where a plain-HTTP proxy stands between.
    return isinstance(getattr(reason, "original_error", reason), NewConnectionError)


def explain(error: Exception, what: str) -> KaggleError | InfrastructureError:
    """One sentence for what requests or kagglesdk raised."""
    status, told = status_of(error), describe(error)
    if passes(error):
        return InfrastructureError(f"Kaggle could not be reached for {what} ({told}); try again later.")
    if status == 401:
        return KaggleError(f"Kaggle does not accept the credentials ({told}); make a new token at {SETTINGS}.", status)
    if status in (403, 404):
        return KaggleError(
            f"Kaggle lets nobody by these credentials do this: {what} ({told}); check the kernel's name and its owner.",
            status,
        )
    if status is not None:
        return KaggleError(f"Kaggle refused {what} ({told}).", status)
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
