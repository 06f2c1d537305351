"""What serves the exports answers as the model does, and the lines that start it are those that were run."""

from __future__ import annotations

import ast
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest

from benchmarks.serving import (
    KINDS,
    PAGE,
    SERVING,
    Reference,
    Said,
    ask_llama_cpp,
    ask_transformers,
    compare_answers,
    find_lines,
    measure,
    token_texts,
)
from benchmarks.tables import evidence
from tests.exported import make_run, write_evidence
from utils.errors import ModelError
from utils.export.adapter import copy_adapter
from utils.export.gguf import file_name
from utils.export.model_card import make_card
from utils.pins import read_pins
from utils.project import ROOT

SERVICE = (SERVING / "service.py").read_text(encoding="utf-8")
MADE = [ROOT / f".venv-{name}" / "installed" for name in ("transformers", "bentoml")]
needs_environments = pytest.mark.skipif(
    not all(mark.exists() for mark in MADE), reason="needs the environments that `python -m benchmarks.serving` makes"
)


@pytest.mark.slow
@needs_environments
def test_every_server_at_hand_answers_token_for_token_as_the_model(demo_run):
    """All the claims of benchmarks/results/serving.json, measured anew."""
    servers = measure(demo_run.path)["servers"]
    ran = {name: found for name, found in servers.items() if "identical" in found}
    assert {"transformers serve", "BentoML"} <= set(ran)
    for name, found in ran.items():
        least = found["prompts"] * (0.5 if "q4_k_m" in name else 0.9 if "q8_0" in name else 1)
        assert found["identical"] >= least, name
    assert ran["transformers serve"]["openai_client_same_text"]


def test_the_evidence_holds_what_the_page_claims():
    servers = evidence("serving")["servers"]
    for name in ("transformers serve", "BentoML"):
        assert servers[name]["identical"] == servers[name]["prompts"] >= 20, name
    assert servers["transformers serve"]["openai_client_same_text"]
    assert "not_run" in servers["vLLM"]
    for found in servers.values():
        assert ("not_run" in found) != ("identical" in found)


def test_cards_and_page_give_the_lines_that_were_run(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path / "run")
    write_evidence(run)
    copy_adapter(run)
    (tmp_path / file_name(KINDS[-1])).write_bytes(b"GGUF")
    cards = {kind: str(make_card(run, kind, {kind: tmp_path}, {})) for kind in ("merged", "gguf")}
    page, servers = PAGE.read_text(encoding="utf-8"), evidence("serving")["servers"]
    for name, kind in (("transformers serve", "merged"), ("vLLM", "merged"), ("llama-server", "gguf")):
        line = next(found["line"] for server, found in reversed(servers.items()) if server.startswith(name))
        assert find_lines(cards[kind], line.partition(" -")[0].partition(" .")[0])[0] == line
        assert line in page
    assert servers["BentoML"]["line"] in SERVICE and servers["BentoML"]["line"] in page
    assert "has not run it" in cards["merged"]  # vLLM's


def test_the_service_is_forty_lines_at_most_and_its_page_calls_what_it_has():
    assert len(SERVICE.splitlines()) <= 40
    (service,) = (node for node in ast.parse(SERVICE).body if isinstance(node, ast.ClassDef))
    methods = {node.name: [word.arg for word in node.args.args] for node in service.body if hasattr(node, "args")}
    path, body = re.search(r"curl http://127\.0\.0\.1:3000/(\w+) .*?-d '(.*?)'", PAGE.read_text(), re.DOTALL).groups()
    assert set(json.loads(body)) <= set(methods[path]) and f"service.py:{service.name}" in SERVICE


def test_what_is_served_with_is_what_it_was_trained_with():
    pins = read_pins()
    for name in ("transformers", "bentoml"):
        path = SERVING / f"requirements-{name}.txt"
        assert not re.search(r"https?:|file:|^-", path.read_text(encoding="utf-8"), re.MULTILINE)
        for package, wanted in read_pins(path).items():
            assert package not in pins or wanted.specifier == pins[package].specifier, package


class Letters:
    """A tokenizer whose ids are letters."""

    eos_token_id = 2

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


REFERENCE = Reference(Letters(), 8, ["a?", "b?"], [[1], [1, 1]], [[97, 2], [98, 2]])


@pytest.mark.parametrize(
    ("said", "identical"),
    [
        ({"a?": Said([97, 2], 1, 2), "b?": Said([98, 2], 2, 2)}, 2),
        ({"a?": Said([97, 2]), "b?": Said([98, 2])}, 2),  # what is not told is not held against a server
        ({"a?": Said([97, 2], 1, 2), "b?": Said([98, 3], 2, 2)}, 1),
        ({"a?": Said([97, 2], 1, 2), "b?": Said([98, 2], 3, 2)}, 1),  # a second BOS
        ({"a?": Said([97, 2], 1, 3), "b?": Said([], 2, 2)}, 0),
    ],
)
def test_one_other_token_in_prompt_or_answer_is_no_agreement(said, identical):
    found = compare_answers(REFERENCE, said.__getitem__, list)
    assert (found["prompts"], found["identical"]) == (2, identical)


def test_a_model_that_says_nothing_agrees_with_nobody():
    silent = Reference(Letters(), 8, ["a?"], [[1]], [[2]])
    assert (
        compare_answers(silent, lambda _: Said([]), lambda ids: [each for each in ids if each != 2])["identical"] == 0
    )


@contextmanager
def answering(kind: str, body: str):
    """A client of a server on 127.0.0.1 that answers every POST with `body`; and what was sent to it."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}", trust_env=False) as client:
        yield client, received
    server.shutdown()
    server.server_close()


def test_a_stream_is_read_token_by_token():
    deltas = [{"role": "assistant"}, {"content": "vit"}, {"content": "D"}, {}]
    chunks = [{"choices": [{"delta": delta}]} for delta in deltas]
    chunks[-1]["usage"] = {"prompt_tokens": 5, "completion_tokens": 3}
    lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    with answering("text/event-stream", lines) as (client, received):
        assert ask_transformers(client, {"model": "."}) == Said(["vit", "D"], 5, 3)
    assert received == [{"model": ".", "stream": True}]


def test_llama_servers_ids_are_read_without_the_end_token():
    ids = [{"id": 7}, {"id": 8}, {"id": 2}]
    body = {"choices": [{"logprobs": {"content": ids}}], "usage": {"prompt_tokens": 4}}
    with answering("application/json", json.dumps(body)) as (client, _):
        assert ask_llama_cpp(client, {}, end=2) == Said([7, 8], 4)


def test_the_texts_of_tokens_are_those_of_the_answer(tiny_model):
    tokenizer = tiny_model[1]
    text = "A man of 30 – 35 °C.\n</think>\n\nvitamin D"
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert "".join(token_texts(tokenizer, ids)) == text
    assert len(token_texts(tokenizer, ids)) <= len(ids)


def test_a_server_that_does_not_start_is_named_with_its_last_words(tmp_path):
    from benchmarks.serving import start

    with (
        pytest.raises(ModelError, match=r"does not answer: no such model"),
        start("sh -c 'echo no such model; exit 1'", tmp_path, "/health"),
    ):
        pass
