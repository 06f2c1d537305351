"""Secrets: found by name in a fixed order of stores; every exception of a platform has its meaning; never shown."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from tests import kaggle_secrets_standin
from tests.loopback import Answer, SecretsServer
from utils import secrets as credentials
from utils.secrets import NAMES, Secret, find_secret, share_secrets

VALUE = "hf_a-secret-of-ours"


def found(name: str, source: str, value: str = VALUE) -> Secret:
    return Secret(name, source, value)


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No store of this machine is seen, and none of the environment's names is left behind."""
    variables = (
        "HF_HOME",
        "NETRC",
        "KAGGLE_USER_SECRETS_TOKEN",
        "KAGGLE_URL_BASE",
        "KAGGLE_KEY",
        "KAGGLE_API_TOKEN",
    )
    for name in (*variables, *(alias for aliases in NAMES.values() for alias in aliases)):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setattr(credentials, "ROOT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path)
    for name in ("kaggle_secrets", "google.colab"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def kaggle(monkeypatch):
    """A Kaggle session: its module, its token in the environment, its server on 127.0.0.1."""
    server = SecretsServer()
    monkeypatch.setitem(sys.modules, "kaggle_secrets", kaggle_secrets_standin)
    monkeypatch.setenv("KAGGLE_USER_SECRETS_TOKEN", "a-session-token")
    monkeypatch.setenv("KAGGLE_URL_BASE", server.address)
    yield server
    server.close()


def colab(monkeypatch, get) -> None:
    """Colab's userdata as `get(module, name)` answers."""
    package, module, userdata = ModuleType("google"), ModuleType("google.colab"), ModuleType("google.colab.userdata")
    for kind in ("SecretNotFoundError", "NotebookAccessError", "TimeoutException"):
        setattr(userdata, kind, type(kind, (Exception,), {}))
    userdata.get = lambda name: get(userdata, name)
    package.colab, module.userdata = module, userdata
    for loaded in (package, module, userdata):
        monkeypatch.setitem(sys.modules, loaded.__name__, loaded)


def on_colab(monkeypatch, secrets: dict[str, str]) -> None:
    def get(userdata, name):
        if name not in secrets:
            raise userdata.SecretNotFoundError(f"Secret {name} does not exist.")
        return secrets[name]

    colab(monkeypatch, get)


def log_in(tmp_path, monkeypatch, value: str = VALUE) -> None:
    (tmp_path / "hub").mkdir(exist_ok=True)
    (tmp_path / "hub" / "token").write_text(f"{value}\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", list(NAMES))
def test_without_any_store_a_secret_is_absent_and_false(name):
    secret = find_secret(name)
    assert secret == Secret(name, "absent") and not secret and secret.value is None


def test_a_login_is_found_where_huggingface_hub_keeps_it(monkeypatch, tmp_path):
    (tmp_path / "caches" / "huggingface").mkdir(parents=True)
    (tmp_path / "caches" / "huggingface" / "token").write_text("from-login\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert find_secret("HF_TOKEN") == found("HF_TOKEN", "cached login", "from-login")


def test_the_stores_are_asked_in_order_kaggle_colab_environment_dotenv_cached_login(kaggle, monkeypatch, tmp_path):
    log_in(tmp_path, monkeypatch, "from-login")
    assert find_secret("HF_TOKEN") == found("HF_TOKEN", "cached login", "from-login")
    (tmp_path / ".env").write_text('HF_TOKEN="from-dotenv"\n')
    assert find_secret("HF_TOKEN") == found("HF_TOKEN", ".env (HF_TOKEN)", "from-dotenv")
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    assert find_secret("HF_TOKEN") == found("HF_TOKEN", "environment (HF_TOKEN)", "from-environment")
    on_colab(monkeypatch, {"HF_TOKEN": "from-colab"})
    assert find_secret("HF_TOKEN") == found("HF_TOKEN", "Colab secrets (HF_TOKEN)", "from-colab")
    kaggle.secrets["HF_TOKEN"] = "from-kaggle"
    assert find_secret("HF_TOKEN") == found("HF_TOKEN", "Kaggle Secrets (HF_TOKEN)", "from-kaggle")
    assert kaggle.received[-1].json == {"Label": "HF_TOKEN", "JWE": "a-session-token"}


def test_a_pushed_run_has_no_secrets_attached_which_is_told(kaggle):
    assert find_secret("HF_TOKEN").source == "Kaggle Secrets: none (BackendError)"


def test_a_kaggle_session_without_a_token_has_no_secrets(kaggle, monkeypatch):
    monkeypatch.delenv("KAGGLE_USER_SECRETS_TOKEN")
    assert find_secret("HF_TOKEN").source == "Kaggle Secrets: none (CredentialError)"
    assert not kaggle.received


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer({}, 403), "ConnectionError"),  # the handlers' order makes every HTTP error one
        (Answer({"wasSuccessful": True, "result": {}}), "BackendError"),
        (Answer(b"<html>"), "JSONDecodeError"),
        (Answer(cut=0), "RemoteDisconnected"),
    ],
    ids=["403", "no secret", "no JSON", "cut"],
)
def test_what_kaggle_answers_otherwise_is_told_and_the_run_goes_on(kaggle, answer, kind):
    kaggle.script["/requests/"] = [answer] * 2
    secret = find_secret("HF_TOKEN")
    assert not secret and secret.source == f"Kaggle Secrets: none ({kind})"


@pytest.mark.parametrize("kind", ["SecretNotFoundError", "NotebookAccessError", "TimeoutException"])
def test_each_of_colabs_exceptions_is_told_without_its_message(monkeypatch, kind):
    def get(userdata, name):
        raise getattr(userdata, kind)(f"{name} {VALUE}")

    colab(monkeypatch, get)
    secret = find_secret("HF_TOKEN")
    assert not secret and kind in secret.source and VALUE not in secret.source


def test_a_store_that_cannot_be_reached_does_not_hide_the_next_one(kaggle, monkeypatch):
    kaggle.close()
    on_colab(monkeypatch, {})
    source = "Kaggle Secrets: none (ConnectionError); Colab secrets: none (SecretNotFoundError)"
    assert find_secret("HF_TOKEN") == Secret("HF_TOKEN", source)
    monkeypatch.setenv("HF_TOKEN", VALUE)
    assert find_secret("HF_TOKEN") == found("HF_TOKEN", "environment (HF_TOKEN)")


@pytest.mark.parametrize(("name", "alias"), [("HF_TOKEN", "HUGGINGFACE_TOKEN"), ("WANDB_API_KEY", "wandb")])
def test_a_second_label_is_tried_although_the_platform_raises_for_the_first(kaggle, monkeypatch, name, alias):
    """Both platforms raise for a label that is not there, so an error alone does not end the search."""
    kaggle.secrets[alias] = VALUE
    assert find_secret(name) == found(name, f"Kaggle Secrets ({alias})")
    del kaggle.secrets[alias]
    on_colab(monkeypatch, {alias: VALUE})
    assert find_secret(name) == found(name, f"Colab secrets ({alias})")


def test_an_alias_in_the_environment_is_found_and_stripped(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "  ")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", f" {VALUE}\n")
    assert find_secret("HF_TOKEN") == found("HF_TOKEN", "environment (HUGGINGFACE_TOKEN)")


def test_a_dotenv_is_read_by_its_own_rules_and_not_exported(tmp_path):
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / ".env").write_text(
        "HF_TOKEN=of-the-checkout\nexport wandb='of the checkout'  # a comment\n"
    )
    assert find_secret("HF_TOKEN").value == "of-the-checkout"
    assert find_secret("WANDB_API_KEY").value == "of the checkout"
    (tmp_path / ".env").write_text("HF_TOKEN=of-here")
    assert find_secret("HF_TOKEN").value == "of-here" and find_secret("WANDB_API_KEY")
    assert "HF_TOKEN" not in os.environ


def test_a_damaged_dotenv_counts_as_none(tmp_path):
    (tmp_path / ".env").write_bytes(b"HF_TOKEN=\xff\xfe")
    assert not find_secret("HF_TOKEN")


def test_a_blank_secret_is_no_secret(kaggle, monkeypatch, tmp_path):
    kaggle.secrets["HF_TOKEN"] = " \n"
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
    assert find_secret("WANDB_API_KEY") == found("WANDB_API_KEY", "cached login")


def test_a_value_is_in_no_representation():
    secret = found("HF_TOKEN", "environment (HF_TOKEN)")
    assert secret
    assert VALUE not in f"{secret} {secret!r} {[secret]}"


def test_a_value_is_in_no_remark_about_a_store_that_failed(kaggle):
    kaggle.script["/requests/"] = [Answer({"wasSuccessful": True, "result": {"token": VALUE}})] * 2
    secret = find_secret("HF_TOKEN")
    assert "BackendError" in secret.source and VALUE not in secret.source


def test_the_hub_token_is_shared_through_the_environment_and_nothing_is_set_without_one(monkeypatch):
    assert share_secrets("HF_TOKEN") == [Secret("HF_TOKEN", "absent")] and "HF_TOKEN" not in os.environ
    monkeypatch.setenv("HUGGINGFACE_TOKEN", VALUE)
    assert share_secrets("HF_TOKEN")[0].source == "environment (HUGGINGFACE_TOKEN)"
    assert os.environ["HF_TOKEN"] == VALUE


def test_the_notebook_that_is_open_asks_once_and_its_processes_do_not_ask_again(kaggle, monkeypatch):
    """In Colab a kernel below the driver has no page to ask through; older versions of its library would wait for ever."""
    monkeypatch.setenv("HF_TOKEN", "")  # put back afterwards
    monkeypatch.setenv("WANDB_API_KEY", "")
    kaggle.secrets["HUGGINGFACE_TOKEN"] = VALUE
    assert [(secret.name, bool(secret)) for secret in share_secrets()] == [("HF_TOKEN", True), ("WANDB_API_KEY", False)]
    asked = len(kaggle.received)
    monkeypatch.setattr(credentials, "find_driver", lambda: "the process that asked")
    assert find_secret("HF_TOKEN") == found("HF_TOKEN", "environment (HF_TOKEN)")
    assert find_secret("WANDB_API_KEY") == Secret("WANDB_API_KEY", "absent")
    assert len(kaggle.received) == asked
