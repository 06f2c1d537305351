"""05 uploads what it exported, from its last section; a failure there costs no stage and is finished by a line that it prints."""

from __future__ import annotations

import re
import shlex
import shutil

from tests import fake_tokens
from tests.conftest import run_command
from tests.e2e.conftest import read_manifest
from tests.loopback import Answer


def test_05_uploads_and_the_line_that_it_prints_finishes_what_failed(small_copy, hub_server):
    hub = {
        "HF_ENDPOINT": hub_server.address, "HF_TOKEN": fake_tokens.hugging_face("05"), "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    shutil.rmtree(small_copy / "export")  # the setting alone runs nothing again
    hub_server.script["alice/medical-merged/commit"] = [Answer({"error": "no room"}, 403)]
    words = ("--run-dir", small_copy, "--from", "05", "--set", "export.push_to_hub=alice/medical")
    done = run_command("run", *words, **hub)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_manifest(small_copy)["stages"]["05_export"]["state"] == "done"
    told = (small_copy / "report/notebooks/05_export.ipynb").read_text(encoding="utf-8")
    assert "alice/medical/commit/" in told and "merged is not uploaded. " in told
    sent = len(hub_server.calls("/storage/"))
    assert sent == 2 and not hub_server.repos["alice/medical-merged"]["commits"]

    line = re.search(r"-m utils (publish \S+ --repo alice/medical --merged) resumes", told)[1]
    again = run_command(*shlex.split(line), "--yes", "--no-wandb", **hub)
    assert again.returncode == 0, again.stderr
    assert len(hub_server.calls("/storage/")) == sent  # both files of weights were there
    for kind, name in (("adapter", "alice/medical"), ("merged", "alice/medical-merged")):
        folder, repo = small_copy / "export" / kind, hub_server.repos[name]
        assert repo["private"] and len(repo["commits"]) == 1
        assert hub_server.files(name) == {path.name: path.read_bytes() for path in folder.iterdir()}
