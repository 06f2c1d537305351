"""What of Kaggle's client is tried again, and what is not."""

from __future__ import annotations

import pytest
import requests

from utils.errors import ServiceError
from utils.kaggle import api


def test_what_the_client_itself_refuses_is_not_tried_again(monkeypatch):
    """ "Title must be at least five characters" stays true the sixth time."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    tried = []

    def refuse():
        tried.append(1)
        raise ValueError("Title must be at least five characters")

    with pytest.raises(ServiceError, match="Title must be at least five characters"):
        api.repeat("the push", refuse, lambda _: None)
    assert len(tried) == 1


def test_an_answer_that_is_no_json_is_tried_again():
    """A proxy's page of HTML, say."""
    assert api.passes(requests.exceptions.JSONDecodeError("Expecting value", "<html>", 0))
