"""A run's exports, served as people would serve them: are the greedy answers the model's own, token for token?

    python -m benchmarks.serving runs/demo
    LLAMA_CPP_DIR=~/llama.cpp python -m benchmarks.serving runs/demo

It makes .venv-transformers and .venv-bentoml, once, from docs/serving/requirements-*.txt; what the locked environment
already has is shared, not copied. It starts each server on 127.0.0.1 with the line that the cards, docs/exports.md and
docs/serving/service.py give, sends the card's request with held-out questions in it, and compares with model.generate
on the merged folder. A server that is not at hand is written down with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import pandas as pd
import tenacity
import typer
from tokenizers.decoders import DecodeStream

from benchmarks.evidence import add_to_file
from benchmarks.llama_cpp import SOURCE
from utils.errors import ModelError
from utils.export.chat_template import chat_ids
from utils.export.gguf import convert, file_name, find_llama_cpp, find_program
from utils.export.model_card import make_card
from utils.export.places import export_folders
from utils.files import write_text
from utils.hardware import installed
from utils.models.load import load_plain
from utils.pipeline.run_dir import RunDir, open_run
from utils.processes import Child
from utils.project import ROOT

OUT = ROOT / "benchmarks" / "results" / "serving.json"
SERVING = ROOT / "docs" / "serving"
PAGE = ROOT / "docs" / "exports.md"
KINDS = ("f16", "q8_0", "q4_k_m")
_PROMPTS = 20
_START_S = 300
# Nothing is asked of a network, and nobody is told of it.
_QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "BENTOML_DO_NOT_TRACK": "True"}


@dataclass(frozen=True)
class Reference:
    """Questions, and what model.generate answers to them from the merged folder's chat template; ids, end included."""

    tokenizer: Any
    limit: int
    questions: list[str]
    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class Said:
    """What a server answered: token ids or, where it tells none, the text of every token; None where it does not count."""

    tokens: list[int] | list[str]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def make_environment(name: str) -> Path:
    """.venv-NAME with docs/serving/requirements-NAME.txt; made anew where that file has changed since."""
    folder, requirements = ROOT / f".venv-{name}", SERVING / f"requirements-{name}.txt"
    wanted, mark = requirements.read_text(encoding="utf-8"), folder / "installed"
    if mark.exists() and mark.read_text(encoding="utf-8") == wanted:
        return folder
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "locked.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    named = set(re.findall(r"^[\w-]+", wanted, re.MULTILINE))
    lock = (ROOT / "requirements-cpu.lock").read_text(encoding="utf-8").splitlines()
    held = folder / "constraints.txt"
    held.write_text("\n".join(line for line in lock if line.partition("==")[0] not in named), encoding="utf-8")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-r", requirements, "-c", held], check=True)
    # Its program `transformers` has to run in this environment.
    again = f"transformers=={installed('transformers')}"
    subprocess.run([*pip, "--no-deps", "--ignore-installed", again], check=True)
    write_text(mark, wanted)
    return folder


def versions_in(environment: Path, *packages: str) -> dict[str, str]:
    """{package: version} as that environment's Python finds them."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([environment / "bin" / "python", "-c", code, *packages], capture_output=True, check=True)
    return json.loads(done.stdout)


def answer_in_transformers(run: RunDir, folder: Path, count: int = _PROMPTS) -> Reference:
    """The reference: greedy, one question after the other, each from the folder's own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    model, limit = load_plain(run.config, str(folder)), run.config.generate.max_new_tokens
    questions = pd.read_parquet(run.file("data/eval.parquet")).head(count)["Question"].tolist()
    answers = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return Reference(tokenizer, limit, questions, [chat_ids(tokenizer, each) for each in questions], answers)


@contextmanager
def start(line: str, folder: Path, health: str, **environment: str) -> Iterator[httpx.Client]:
    """A client of the server that `line` starts in `folder`, on 127.0.0.1 and a free port; ModelError if it does not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["sh", "-c", 'cd "$0" && exec "$@"', folder, *shlex.split(line), "--host", "127.0.0.1", "--port", port]
    with (
        tempfile.TemporaryDirectory() as scratch,
        Child(words, Path(scratch) / "log", {**_QUIET, "BENTOML_HOME": scratch, **environment}) as child,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_START_S, trust_env=False) as client,
    ):
        loading = tenacity.Retrying(
            stop=lambda state: child.poll() is not None or state.seconds_since_start > _START_S,
            wait=tenacity.wait_fixed(0.1),
        )
        try:
            loading(lambda: client.get(health).raise_for_status())
        except tenacity.RetryError:
            raise ModelError(f"{line} does not answer: {child.last_words()}") from None
        yield client


def compare_answers(reference: Reference, ask: Callable[[str], Said], expect: Callable[[list[int]], list]) -> dict:
    """How many questions a server answers with the reference's tokens, as `expect` renders these."""
    same, before = 0, time.monotonic()
    for question, prompt, ids in zip(reference.questions, reference.prompts, reference.answers, strict=True):
        said, wanted = ask(question), expect(ids)
        counted = said.prompt_tokens in (None, len(prompt)) and said.completion_tokens in (None, len(ids))
        same += bool(wanted) and counted and said.tokens == wanted
    seconds = round(time.monotonic() - before, 1)
    return {"prompts": len(reference.questions), "identical": same, "seconds": seconds}


def ask_transformers(client: httpx.Client, request: dict) -> Said:
    """`transformers serve` streams the text of every token, and counts them; it tells no ids."""
    with client.stream("POST", "/v1/chat/completions", json=request | {"stream": True}) as response:
        response.raise_for_status()
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    deltas, usage = [chunk["choices"][0]["delta"] for chunk in chunks], chunks[-1]["usage"]
    texts = [delta["content"] for delta in deltas if "content" in delta]
    return Said(texts, usage["prompt_tokens"], usage["completion_tokens"])


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of every token as a stream gives it, where a character of several tokens comes with its last."""
    stream = DecodeStream([], skip_special_tokens=True)
    return [text for each in ids if (text := stream.step(tokenizer._tokenizer, each)) is not None]


def ask_llama_cpp(client: httpx.Client, request: dict, end: int) -> Said:
    """llama-server tells ids beside probabilities, with or without the end token."""
    found = client.post("/v1/chat/completions", json=request | {"logprobs": True, "top_logprobs": 1})
    body = found.raise_for_status().json()
    ids = [each["id"] for each in body["choices"][0]["logprobs"]["content"]]
    return Said([each for each in ids if each != end], body["usage"]["prompt_tokens"])


def ask_bentoml(client: httpx.Client, question: str, limit: int) -> Said:
    found = client.post("/answer", json={"question": question, "max_new_tokens": limit})
    return Said(found.raise_for_status().json()["tokens"])


def find_lines(text: str, program: str) -> tuple[str, dict]:
    """(the line of a card that starts `program`, the JSON that the next `curl` sends), the latter asking greedily."""
    found = re.search(rf"^({re.escape(program)} .*?)(?:  #.*)?$", text, re.MULTILINE)
    request = json.loads(re.search(r"-d '(.*)'", text[found.end() :])[1])
    return found[1], {**request, "temperature": 0}


def asking(request: dict, question: str) -> dict:
    return request | {"messages": [{"role": "user", "content": question}]}


def serve_by_transformers(run: RunDir, folder: Path, reference: Reference) -> dict:
    """The merged folder behind `transformers serve`, asked by HTTP and by the page's lines for the openai client."""
    environment = make_environment("transformers")
    line, request = find_lines(str(make_card(run, "merged", {"merged": folder}, {})), "transformers serve")
    request["max_tokens"], path = reference.limit, f"{environment / 'bin'}:{os.environ['PATH']}"
    before = time.monotonic()
    with start(line, folder, "/health", PATH=path) as client:
        begun = round(time.monotonic() - before, 1)
        figures = compare_answers(
            reference,
            lambda question: ask_transformers(client, asking(request, question)),
            lambda ids: token_texts(reference.tokenizer, ids),
        )
        same = ask_by_the_page(environment, client, reference)
    versions = versions_in(environment, "transformers", "fastapi", "uvicorn", "openai", "torch")
    return {"line": line, "versions": versions, "starts_s": begun, **figures, "openai_client_same_text": same}


def ask_by_the_page(environment: Path, client: httpx.Client, reference: Reference) -> bool:
    """Whether the page's lines, run with the first question, print the reference's text."""
    code = re.search(r"```python\n(from openai .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    code = re.sub(r"http://127\.0\.0\.1:\d+", str(client.base_url).rstrip("/"), code)
    code = re.sub(r'(?<="content": )"[^"]*"', lambda _: json.dumps(reference.questions[0]), code)
    code = re.sub(r"max_tokens=\d+", f"max_tokens={reference.limit}", code)
    done = subprocess.run([environment / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n") == reference.tokenizer.decode(reference.answers[0], skip_special_tokens=True)


def serve_by_llama_cpp(run: RunDir, folders: dict[str, Path], reference: Reference) -> dict[str, dict]:
    """Each kind of GGUF behind llama-server."""
    tree, found, end = find_llama_cpp(), {}, reference.tokenizer.eos_token_id
    program = tree and find_program(tree, "llama-server")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if program:
            convert(tree, folders["merged"], folders["adapter"], folder, KINDS)
        else:
            (folder / file_name(KINDS[-1])).touch()  # for the card
        line, request = find_lines(str(make_card(run, "gguf", {"gguf": folder}, {})), "llama-server")
        if program is None:
            return {
                "llama-server": {
                    "line": line,
                    "not_run": "no built llama.cpp was at hand, and to build one takes 10 to 40 minutes",
                }
            }
        request["max_tokens"] = reference.limit
        for kind in KINDS:
            words = line.replace(file_name(KINDS[-1]), file_name(kind))
            words = words.replace("llama-server", shlex.quote(str(program)), 1)
            before = time.monotonic()
            with start(words, folder, "/health") as client:
                begun = round(time.monotonic() - before, 1)
                figures = compare_answers(
                    reference,
                    lambda question, client=client: ask_llama_cpp(client, asking(request, question), end),
                    lambda ids: [each for each in ids if each != end],
                )
            shown = line.replace(file_name(KINDS[-1]), file_name(kind))
            found[f"llama-server, {kind}"] = {"line": shown, "from": SOURCE, "starts_s": begun, **figures}
    return found


def serve_by_bentoml(folder: Path, reference: Reference) -> dict:
    """The merged folder behind docs/serving/service.py."""
    environment = make_environment("bentoml")
    text = (SERVING / "service.py").read_text(encoding="utf-8")
    line = re.search(r"^ *MODEL=\S+ (bentoml serve .*)$", text, re.MULTILINE)[1]
    words = re.sub(r" --(host|port) \S+", "", line)
    before = time.monotonic()
    with start(words, ROOT, "/readyz", PATH=f"{environment / 'bin'}:{os.environ['PATH']}", MODEL=str(folder)) as client:
        begun = round(time.monotonic() - before, 1)
        figures = compare_answers(
            reference, lambda question: ask_bentoml(client, question, reference.limit), lambda ids: list(ids)
        )
    versions = versions_in(environment, "bentoml", "transformers", "torch")
    return {"line": line, "versions": versions, "starts_s": begun, **figures}


def measure(run_dir: Path) -> dict:
    """Serve and compare; returns the evidence."""
    run = open_run("auto", run_dir)
    folders = export_folders(run)
    reference = answer_in_transformers(run, folders["merged"])
    line, _ = find_lines(str(make_card(run, "merged", folders, {})), "vllm serve")
    return {
        "what": "greedy answers of servers on a run's exports, against model.generate on the merged folder",
        "date": datetime.now(UTC).date().isoformat(),
        "profile": run.config.profile,
        "answer_tokens": sum(map(len, reference.answers)),
        "servers": {
            "transformers serve": serve_by_transformers(run, folders["merged"], reference),
            **serve_by_llama_cpp(run, folders, reference),
            "BentoML": serve_by_bentoml(folders["merged"], reference),
            "vLLM": {"line": line, "not_run": "neither it nor the GPU that it is made for was at hand"},
        },
    }


def main(run_dir: Path, out: Annotated[Path, typer.Option(help="Where the evidence goes, JSON.")] = OUT) -> None:
    """Serve the exports of RUN_DIR, ask, compare, and write OUT."""
    add_to_file(out, measure(run_dir))


if __name__ == "__main__":
    typer.run(main)
