"""The Hub, asked with patience: a crowded address is waited for, and what stays closed is a sentence that names a token."""

from __future__ import annotations

import pytest

from tests.loopback import Answer, Loopback, Received
from utils.config import load_config
from utils.data.hub import ask_hub, find_commits, load_hub_table
from utils.errors import DataError, ModelError
from utils.models.tokenizer import check_model

SHA = "f" * 40
MODEL = load_config("demo", {"model.name": "someone/some-model", "model.revision": "a/branch"})


class InfoServer(Loopback):
    """The Hub's answers about repositories, all of which it knows."""

    def respond(self, request: Received) -> Answer:
        files = [{"rfilename": "model.safetensors", "size": 2**31}, {"rfilename": "model.bin", "size": 2**33}]
        return Answer({"id": "someone/some-model", "sha": SHA, "siblings": files})


@pytest.fixture
def hub(monkeypatch):
    """A Hub on 127.0.0.1; `hub.waited` are the seconds that somebody would have slept."""
    server = InfoServer()
    server.waited = []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", server.waited.append)
    monkeypatch.setenv("HF_TOKEN", "")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield server
    server.close()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_turns_away_is_asked_again_and_as_late_as_it_says(hub, status):
    hub.script["/api/models/"] = [Answer({}, status, {"Retry-After": "7"}), Answer({}, status)]
    assert check_model(MODEL) == (f"someone/some-model at {SHA[:12]}, 2.0 GiB to download", SHA)
    assert (
        hub.waited == [8.0, 2.0] and len(hub.calls("/api/models/")) == 3
    )  # a second is added to the seven; else it doubles
    assert hub.calls("some")[0].path == "/api/models/someone/some-model/revision/a%2Fbranch?blobs=true"


def test_data_sets_are_pinned_after_a_wait_too(hub):
    hub.script["/api/datasets/"] = [Answer({}, 429)]
    assert find_commits(load_config("t4")) == {"evaluate.benchmark.revision": SHA}


def test_a_hub_that_stays_closed_is_a_sentence_that_names_the_token(hub):
    hub.script["/api/models/"] = [Answer({}, 429)] * 6
    with pytest.raises(ModelError) as caught:
        check_model(MODEL)
    assert "429 Too Many Requests" in str(caught.value) and "set HF_TOKEN where the Hub limits" in str(caught.value)
    hub.script["/"] = [Answer({}, 429)] * 60
    with pytest.raises(DataError, match=r"could not be loaded from the Hub.*set HF_TOKEN where.*by data.path"):
        load_hub_table("someone/rows", None, SHA, "train", "data.path")
    hub.script["/"] = [Answer({}, 429)] * 6
    assert find_commits(load_config("t4")) == {}  # loading the items says why


def test_an_unknown_or_gated_repository_is_asked_for_once(hub):
    hub.script["/api/models/"] = [Answer({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})]
    with pytest.raises(ModelError, match="set HF_TOKEN where the Hub limits or gates it"):
        check_model(MODEL)
    assert len(hub.calls("/api/models/")) == 1 and hub.waited == []


def test_where_there_is_no_network_nobody_waits(hub):
    hub.script["/api/models/"] = [Answer(cut=0)]
    with pytest.raises(ModelError, match="neither a local folder nor reachable on the Hub"):
        check_model(MODEL)
    assert len(hub.calls("/api/models/")) == 1 and hub.waited == []


def test_what_the_hub_says_is_handed_on_as_it_is(hub):
    assert ask_hub("datasets", "someone/rows")["sha"] == SHA
    assert hub.calls("some")[0].path == "/api/datasets/someone/rows?blobs=true"
