"""Secrets, read by name: Kaggle, Colab, environment, cached login, in that order. A value is never printed."""

from __future__ import annotations

import netrc
import os
from dataclasses import dataclass, field
from pathlib import Path

NAMES = {"HF_TOKEN": ("HF_TOKEN", "HUGGINGFACE_TOKEN"), "WANDB_API_KEY": ("WANDB_API_KEY", "wandb")}


@dataclass(frozen=True)
class Secret:
    """A secret's value, hidden from repr, and where it was found; `source` says why where there is none."""

    name: str
    source: str
    value: str | None = field(default=None, repr=False)

    def __bool__(self) -> bool:
        return self.value is not None


def find_secret(name: str) -> Secret:
    """Look a secret up by its name in `NAMES` and the aliases there.

    Never raises: a store that cannot be reached counts as one that does not hold the secret, and `source` says so,
    because a run pushed through Kaggle's API has no secrets and must succeed all the same.
    """
    remarks = []
    for store, look in (("Kaggle Secrets", _from_kaggle), ("Colab secrets", _from_colab)):
        remark = None
        for alias in NAMES[name]:
            try:
                value = (look(alias) or "").strip()
            except Exception as error:  # each platform has a zoo of exceptions; the type is all that may be told
                remark = remark or f"{store}: {type(error).__name__}"
                continue  # a label that does not exist raises too: the next alias may
            if value:
                return Secret(name, f"{store} ({alias})", value)
        remarks += [remark] if remark else []
    for alias in NAMES[name]:
        if os.environ.get(alias, "").strip():
            return Secret(name, f"environment ({alias})", os.environ[alias].strip())
    value = _from_cached_login(name)
    if value:
        return Secret(name, "cached login", value)
    return Secret(name, "; ".join(remarks) or "absent")


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


def share_hub_token() -> Secret:
    """Put the HF token, where there is one, into the environment that huggingface_hub reads; return its description."""
    secret = find_secret("HF_TOKEN")
    if secret:
        os.environ["HF_TOKEN"] = secret.value
    return secret
