"""Servers on 127.0.0.1 that stand in for Kaggle and the Hugging Face Hub, and keep what they were sent."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests import fake_tokens
from utils.files import read_json, write_json
from utils.project import ROOT, python_path

DEAD = "http://127.0.0.1:9"  # nothing listens there: a request that strays outside fails at once


@dataclass
class Received:
    """One request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """What to send back; `cut` closes the connection after so many bytes of the body instead (0: without a word)."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    hang_up: int | None = None  # closes the connection after so many bytes of what is sent to it
    first: Callable[[], Any] | None = None  # what the server does all the same before it fails


class Loopback(ABC):
    """A threaded HTTP server. `script[part]` holds answers that come first for addresses that contain `part`."""

    def __init__(self):
        self.received: list[Received] = []
        self.script: dict[str, list[Answer]] = defaultdict(list)
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self):
                path = re.sub(r"^http://[^/]+", "", self.path)  # a proxy is asked for the whole address
                with outer._lock:
                    scripted = next(
                        (outer.script[part] for part in outer.script if part in path and outer.script[part]), None
                    )
                    answer = scripted.pop(0) if scripted else None
                size = int(self.headers.get("Content-Length") or 0)
                if answer and answer.hang_up is not None:
                    part = Received(self.command, path, dict(self.headers), self.rfile.read(min(size, answer.hang_up)))
                    outer.received.append(part)
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                body = self.rfile.read(size)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = self._read_chunks()
                request = Received(self.command, path, dict(self.headers), body)
                with outer._lock:
                    outer.received.append(request)
                    if answer is None:
                        answer = outer.respond(request)
                    elif answer.first:
                        answer.first()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has given up
                    self._send(answer)

            do_GET = do_POST = do_HEAD = do_PUT = _serve

            def _read_chunks(self) -> bytes:
                parts = []
                while size := int(self.rfile.readline().strip(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _send(self, answer: Answer) -> None:
                content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                if answer.cut == 0:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content if answer.cut is None else content[: answer.cut])
                if answer.cut is not None:
                    self.close_connection = True

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @abstractmethod
    def respond(self, request: Received) -> Answer:
        """What this server answers."""

    def calls(self, part: str) -> list[Received]:
        return [request for request in self.received if part in request.path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class KaggleServer(Loopback):
    """The kernels service as facts of kaggle 2.2.4 and kagglesdk 0.1.37: pushes, versions, sessions, outputs."""

    def __init__(self, user: str = "alice"):
        super().__init__()
        self.user = user
        self.versions: list[dict[str, Any]] = []
        self.statuses: list[dict[str, str]] = []  # told one after the other, the last one for ever
        self.files: dict[str, bytes] = {}
        self.log = ""
        self.page_size = 100

    def respond(self, request: Received) -> Answer:
        method = request.path.rpartition("/")[2]
        if request.path.startswith("/files/"):
            return Answer(
                self.files[request.path.removeprefix("/files/")], headers={"Content-Type": "application/octet-stream"}
            )
        answer = getattr(self, f"_{method}", None)
        return answer(request) if answer else Answer({"code": 404, "message": f"no {request.path}"}, 404)

    def _IntrospectToken(self, request: Received) -> Answer:
        return Answer({"active": request.json["token"].startswith("KGAT"), "username": self.user})

    def save(self, body: dict[str, Any]) -> dict[str, Any]:
        self.versions.append(body)
        return {"ref": f"/code/{body['slug']}", "url": f"https://www.kaggle.com/code/{body['slug']}",
                "versionNumber": len(self.versions)}  # fmt: skip

    def _SaveKernel(self, request: Received) -> Answer:
        return Answer(self.save(request.json))

    def _GetKernel(self, request: Received) -> Answer:
        if not self.versions:
            return Answer({"code": 403, "message": "Permission 'kernels.get' was denied"}, 403)
        return Answer(
            {"metadata": {"currentVersionNumber": len(self.versions)}, "blob": {"source": self.versions[-1]["text"]}}
        )

    def _GetKernelSessionStatus(self, request: Received) -> Answer:
        if len(self.statuses) > 1:
            return Answer(self.statuses.pop(0))
        return Answer(self.statuses[0] if self.statuses else {"status": "complete", "failureMessage": ""})

    def _ListKernelSessionOutput(self, request: Received) -> Answer:
        start = int(request.json.get("pageToken") or 0)
        names = sorted(self.files)[start : start + self.page_size]
        following = start + self.page_size
        return Answer({
            "files": [{"url": f"http://localhost/files/{name}", "fileName": name} for name in names],
            "log": self.log,
            "nextPageToken": str(following) if following < len(self.files) else "",
        })  # fmt: skip


class HubServer(Loopback):
    """create, preupload, LFS, commit and info of the Hub, as huggingface_hub 1.33 asks for them without Xet.

    As there, weights and what is larger than `regular` bytes go by LFS, and an object that arrived stays, committed or not.
    """

    def __init__(self):
        super().__init__()
        self.repos: dict[str, dict[str, Any]] = {}  # {name: {"private", "commits": [{path: bytes}]}}
        self.objects: dict[str, bytes] = {}  # LFS's, by sha256
        self.parts: dict[str, bytes] = {}  # of an object that is on its way, by address
        self.regular = 10 * 2**20
        self.chunk = 0  # so many bytes to a part; 0: each object whole

    def files(self, repo: str) -> dict[str, bytes]:
        return {path: content for commit in self.repos[repo]["commits"] for path, content in commit.items()}

    def respond(self, request: Received) -> Answer:
        path = request.path.partition("?")[0]
        if path == "/api/repos/create":
            return self._create(request.json)
        if path == "/api/validate-yaml":
            return Answer({"errors": [], "warnings": []})
        if path.startswith("/storage/"):
            return self._store(path, request)
        if path.endswith(".git/info/lfs/objects/batch"):
            return Answer({"transfer": "basic", "objects": [self._offer(wanted) for wanted in request.json["objects"]]})
        if path.endswith(".git/info/lfs/verify"):
            whole = len(self.objects.get(request.json["oid"], b"")) == request.json["size"]
            return Answer({}) if whole else Answer({"error": "Not found"}, 404)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|revision)/main)?", path)
        if not found or found[1] not in self.repos:
            return Answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if found[2] == "preupload":
            return self._preupload(found[1], request.json)
        if found[2] == "commit":
            return self._commit(found[1], request.body)
        private = self.repos[found[1]]["private"]
        return Answer({"id": found[1], "modelId": found[1], "private": private, "sha": "0" * 40, "siblings": []})

    def _create(self, body: dict[str, Any]) -> Answer:
        name = f"{body['organization']}/{body['name']}"
        url = f"{self.address}/{name}"
        if name in self.repos:
            return Answer({"error": "You already created this model repo", "url": url}, 409)
        self.repos[name] = {"private": body.get("visibility") == "private", "commits": []}
        return Answer({"url": url})

    def _by_lfs(self, path: str, size: int) -> bool:
        return path.endswith((".safetensors", ".gguf")) or size > self.regular

    def _preupload(self, repo: str, body: dict[str, Any]) -> Answer:
        oids = {}
        for path, data in self.files(repo).items():
            whole = self._by_lfs(path, len(data))
            oids[path] = (sha256(data) if whole else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()
        return Answer({"files": [
            {"path": entry["path"], "uploadMode": "lfs" if self._by_lfs(entry["path"], entry["size"]) else "regular",
             "shouldIgnore": False, "oid": oids.get(entry["path"])}
            for entry in body["files"]
        ]})  # fmt: skip

    def _offer(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where an object goes; without actions for one that is here."""
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.objects:
            return {"oid": oid, "size": size}
        place, header = f"{self.address}/storage/{oid}", {}
        if self.chunk:
            parts = range(1, -(-size // self.chunk) + 1)
            header = {"chunk_size": str(self.chunk), **{str(part): f"{place}/{part}" for part in parts}}
        verify = {"href": f"{self.address}/any/model.git/info/lfs/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": place, "header": header}, "verify": verify}}

    def _store(self, path: str, request: Received) -> Answer:
        """A PUT of an object or of one part, or the POST that puts the parts together."""
        oid, _, part = path.removeprefix("/storage/").partition("/")
        if request.method == "PUT" and part:
            self.parts[path] = request.body
            return Answer(b"", headers={"ETag": hashlib.md5(request.body).hexdigest()})
        body = request.body
        if request.method == "POST":
            sent = [self.parts.pop(f"{path}/{part['partNumber']}") for part in request.json["parts"]]
            body = b"".join(sent)
        if sha256(body).hexdigest() != oid:
            return Answer({"error": "the content is not what was announced"}, 400)
        self.objects[oid] = body
        return Answer(b"")

    def _commit(self, repo: str, body: bytes) -> Answer:
        files = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.objects:
                    return Answer({"error": f"no LFS object for {line['value']['path']}"}, 400)
                files[line["value"]["path"]] = self.objects[line["value"]["oid"]]
        self.repos[repo]["commits"].append(files)
        sha = hashlib.sha1(body).hexdigest()
        url = f"{self.address}/{repo}/commit/{sha}"
        return Answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


class SecretsServer(Loopback):
    """Kaggle's store of user secrets: a label that is not attached is an HTTP 200 that was not successful."""

    def __init__(self):
        super().__init__()
        self.secrets: dict[str, str] = {}

    def respond(self, request: Received) -> Answer:
        label = request.json["Label"]
        if label not in self.secrets:
            message = f"No user secrets exist for kernel id 1 and label {label}."
            return Answer({"errors": [message], "error": {"code": 5}, "wasSuccessful": False})
        return Answer({"wasSuccessful": True, "result": {"secret": self.secrets[label]}})


def kaggle_environment(server: Loopback, home: Path, **more: str) -> dict[str, str]:
    """The variables by which the unmodified Kaggle package talks to `server` and to nobody else.

    Of its environments only LOCALHOST stays here, at port 80: hence the proxy. HOME and configuration are empty.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("KAGGLE_", "HF_", "WANDB_", "HUGGING")) and not name.upper().endswith("_PROXY")
    }
    here = {"http_proxy": server.address, "https_proxy": DEAD, "no_proxy": ""}
    return kept | {
        "HOME": str(home),
        "KAGGLE_CONFIG_DIR": str(home / ".kaggle"),
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_USERNAME": "alice",
        "KAGGLE_KEY": fake_tokens.kaggle_key("loopback"),
        **here,
        **{name.upper(): value for name, value in here.items()},
        **more,
    }


def kaggle_cli(server: Loopback, home: Path, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """The real command line `kaggle WORDS`."""
    command = [str(Path(sys.executable).with_name("kaggle")), *words]
    environment = kaggle_environment(server, home)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)


def series_call(server: Loopback, home: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess:
    """The same as `series_cli` in this process, and nothing is waited for: for the many tests of one behaviour each."""
    from utils.__main__ import main

    environment = kaggle_environment(server, home) | variables
    metadata = home / ".series" / "kernel-metadata.json"  # a fork's names its owner
    write_json(metadata, read_json(ROOT / metadata.name) | {"id": "OWNER/deepseek-r1-medical-lora"})
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.dict(os.environ, environment, clear=True),
        patch.object(sys, "argv", ["utils", *map(str, words)]),
        patch("utils.kaggle.push.METADATA", metadata),
        patch("time.sleep"),
        contextlib.chdir(home),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        forget_kaggle()
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def forget_kaggle() -> None:
    """The package reads its environment when it is first imported: not the one of another test."""
    kept = sys.modules.get("kaggle.api.kaggle_api_extended")
    if kept is not None and "--local" not in kept.KaggleApi.args:
        for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
            del sys.modules[name]


def series_cli(
    server: Loopback, home: Path, *words: str | Path, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess:
    """`python -m utils WORDS`, which talks to `server` as if it were Kaggle; alice's, whoever forked the series."""
    owner = ("--username", "alice") if words[0] in ("push", "collect") else ()
    command = [sys.executable, "-m", "utils", *map(str, words), *owner]
    environment = kaggle_environment(server, home, COLUMNS="200", PYTHONPATH=python_path()) | variables
    return subprocess.run(
        command, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )
