"""Secrets: found by name in a fixed order of stores, absent without an error, never shown."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from utils.credentials import NAMES, Secret, find_secret, share_hub_token

VALUE = "hf_a-secret-of-ours"


class BackendError(Exception):
    """What Kaggle raises for a label that does not exist or is not attached."""


class SecretNotFoundError(Exception):
    """What Colab raises for a name that does not exist."""


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No store of this machine is seen, and none of the environment's names is left behind."""
    for name in ("HF_HOME", "NETRC", *(alias for aliases in NAMES.values() for alias in aliases)):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    for name in ("kaggle_secrets", "google.colab"):
        monkeypatch.setitem(sys.modules, name, None)


def on_kaggle(monkeypatch, secrets: dict[str, str], error: Exception | None = None) -> None:
    """Kaggle's module: a label that is not attached raises BackendError; `error` is raised on sight."""

    class UserSecretsClient:
        def __init__(self):
            if error:
                raise error

        def get_secret(self, label: str) -> str:
            if label not in secrets:
                raise BackendError("No user secrets exist for kernel id 1 and label.")
            return secrets[label]

    module = ModuleType("kaggle_secrets")
    module.UserSecretsClient = UserSecretsClient
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)


def on_colab(monkeypatch, secrets: dict[str, str]) -> None:
    """Colab's module: a name that is not there raises SecretNotFoundError."""

    def get(name: str) -> str:
        if name not in secrets:
            raise SecretNotFoundError(name)
        return secrets[name]

    package, module, userdata = ModuleType("google"), ModuleType("google.colab"), ModuleType("google.colab.userdata")
    package.colab, module.userdata, userdata.get = module, userdata, get
    for loaded in (package, module, userdata):
        monkeypatch.setitem(sys.modules, loaded.__name__, loaded)


def log_in(tmp_path, monkeypatch, value: str = VALUE) -> None:
    (tmp_path / "hub").mkdir(exist_ok=True)
    (tmp_path / "hub" / "token").write_text(f"{value}\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", list(NAMES))
def test_without_any_store_a_secret_is_absent_and_false(name):
    secret = find_secret(name)
    assert secret == Secret(name, "absent") and not secret and secret.value is None


def test_the_stores_are_asked_in_order_kaggle_colab_environment_cached_login(monkeypatch, tmp_path):
    log_in(tmp_path, monkeypatch, "from-login")
    assert find_secret("HF_TOKEN") == Secret("HF_TOKEN", "cached login", "from-login")
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    assert find_secret("HF_TOKEN") == Secret("HF_TOKEN", "environment (HF_TOKEN)", "from-environment")
    on_colab(monkeypatch, {"HF_TOKEN": "from-colab"})
    assert find_secret("HF_TOKEN") == Secret("HF_TOKEN", "Colab secrets (HF_TOKEN)", "from-colab")
    on_kaggle(monkeypatch, {"HF_TOKEN": "from-kaggle"})
    assert find_secret("HF_TOKEN") == Secret("HF_TOKEN", "Kaggle Secrets (HF_TOKEN)", "from-kaggle")


def test_a_run_pushed_to_kaggle_without_secrets_goes_on_and_is_told_why(monkeypatch):
    on_kaggle(monkeypatch, {})
    secret = find_secret("HF_TOKEN")
    assert not secret and secret.source == "Kaggle Secrets: BackendError"


def test_a_store_that_cannot_be_reached_does_not_hide_the_next_one(monkeypatch):
    on_kaggle(monkeypatch, {}, error=ConnectionError("no internet"))
    on_colab(monkeypatch, {})
    assert find_secret("HF_TOKEN").source == "Kaggle Secrets: ConnectionError; Colab secrets: SecretNotFoundError"
    monkeypatch.setenv("HF_TOKEN", VALUE)
    assert find_secret("HF_TOKEN").source == "environment (HF_TOKEN)"


@pytest.mark.parametrize(("name", "alias"), [("HF_TOKEN", "HUGGINGFACE_TOKEN"), ("WANDB_API_KEY", "wandb")])
@pytest.mark.parametrize("platform", [on_kaggle, on_colab], ids=["Kaggle", "Colab"])
def test_a_second_label_is_tried_although_the_platform_raises_for_the_first(monkeypatch, platform, name, alias):
    """Both platforms raise for a label that is not there, so an error alone does not end the search."""
    platform(monkeypatch, {alias: VALUE})
    assert find_secret(name).value == VALUE


def test_an_alias_in_the_environment_is_found_and_stripped(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "  ")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", f" {VALUE}\n")
    assert find_secret("HF_TOKEN") == Secret("HF_TOKEN", "environment (HUGGINGFACE_TOKEN)", VALUE)


def test_a_blank_secret_is_no_secret(monkeypatch, tmp_path):
    on_kaggle(monkeypatch, {"HF_TOKEN": " \n"})
    log_in(tmp_path, monkeypatch, "  ")
    assert not find_secret("HF_TOKEN")


def test_the_cached_login_of_the_hub_is_found_below_home_too(tmp_path):
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text(VALUE)
    assert find_secret("HF_TOKEN").value == VALUE


def test_a_damaged_cached_login_counts_as_none(monkeypatch, tmp_path):
    log_in(tmp_path, monkeypatch)
    (tmp_path / "hub" / "token").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".netrc").write_text("machine\nmachine")
    assert not find_secret("HF_TOKEN") and not find_secret("WANDB_API_KEY")


@pytest.mark.parametrize("host", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_the_cached_login_of_wandb_is_read_from_netrc(tmp_path, host):
    (tmp_path / ".netrc").write_text(f"machine {host}\n  login user\n  password {VALUE}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert find_secret("WANDB_API_KEY") == Secret("WANDB_API_KEY", "cached login", VALUE)


def test_a_value_is_in_no_representation():
    secret = Secret("HF_TOKEN", "environment (HF_TOKEN)", VALUE)
    assert secret
    assert VALUE not in f"{secret} {secret!r} {[secret]}"


def test_a_value_is_in_no_remark_about_a_store_that_failed(monkeypatch):
    on_kaggle(monkeypatch, {}, error=BackendError(f"token {VALUE} is not valid"))
    assert VALUE not in find_secret("HF_TOKEN").source


def test_the_hub_token_is_shared_through_the_environment_and_nothing_is_set_without_one(monkeypatch):
    assert not share_hub_token() and "HF_TOKEN" not in os.environ
    monkeypatch.setenv("HUGGINGFACE_TOKEN", VALUE)
    assert share_hub_token().source == "environment (HUGGINGFACE_TOKEN)"
    assert os.environ["HF_TOKEN"] == VALUE
