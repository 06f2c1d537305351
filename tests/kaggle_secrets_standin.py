"""A stand-in for Kaggle's `kaggle_secrets`, with its classes, its address and its order of handlers.

Written from what Kaggle/docker-python's patches/kaggle_secrets.py does: the credential comes from the environment and its
absence is an error of the constructor; a label that is not attached and any answer out of form are BackendError; every
HTTP error is a ConnectionError, because URLError is handled before HTTPError, which is a subclass of it.
"""

import json
import os
import socket
import urllib.error
import urllib.request


class CredentialError(Exception):
    pass


class BackendError(Exception):
    pass


class ValidationError(Exception):
    pass


class UserSecretsClient:
    timeout = 40

    def __init__(self):
        self.base = os.getenv("KAGGLE_URL_BASE") or "https://www.kaggle.com"
        self.token = os.getenv("KAGGLE_USER_SECRETS_TOKEN")
        if self.token is None:
            raise CredentialError("A JWT Token is required to use the UserSecretsClient.")

    def get_secret(self, label):
        if not label:
            raise ValidationError("Label must be non-empty.")
        result = self._ask({"Label": label, "JWE": self.token})
        if "secret" not in result:
            raise BackendError(f"Unexpected response from the service. Response: {result}")
        return result["secret"]

    def _ask(self, body):
        request = urllib.request.Request(
            f"{self.base}/requests/GetUserSecretByLabelRequest",
            headers={"Content-type": "application/json"},
            data=json.dumps(body).encode(),
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read())
        except (urllib.error.URLError, socket.timeout) as error:  # noqa: UP041 - as there
            if isinstance(error, TimeoutError) or isinstance(error.reason, TimeoutError):
                raise ConnectionError("Timeout error trying to communicate with service.") from error
            raise ConnectionError("Connection error trying to communicate with service.") from error
        if not answer.get("wasSuccessful") or "result" not in answer:
            raise BackendError(f"Unexpected response from the service. Response: {answer}.")
        return answer["result"]
