"""A stand-in for google.colab.userdata without any secret."""


class SecretNotFoundError(Exception):
    pass


def get(key: str) -> str:
    raise SecretNotFoundError(f"Secret {key} does not exist.")
