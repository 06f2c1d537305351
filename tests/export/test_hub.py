"""Uploads against a Hub on 127.0.0.1: one commit for each repository, retries where they help, files untouched."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from tests import fake_tokens
from tests.loopback import DEAD, Answer
from tests.staged import complete
from utils.errors import InfrastructureError, RunDirError, ServiceError
from utils.export.hub import offline_runs, plan_uploads, push_to_hub, upload_model
from utils.export.places import scratch_folder
from utils.files import record_files, write_json, write_text
from utils.pipeline.run_dir import open_run, read_manifest
from utils.pipeline.stages import STAGES
from utils.project import python_path
from utils.secrets import find_secret

TOKEN = fake_tokens.hugging_face("publish")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with an exported adapter and a merged model, small."""
    path = tmp_path / "run"
    made = complete(path)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors"):
        (path / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "export" / name).write_bytes(name.encode() * 500)
    for kind in ("adapter", "merged"):
        write_text(path / "export" / kind / "README.md", "---\nlicense: apache-2.0\n---\n# A card\n")
    write_json(path / "comparison" / "metrics.json", {"sentence": "After fine-tuning the model is worse."})
    write_json(path / "export" / "verify.json", {"folders": {"adapter": "export/adapter", "merged": "export/merged"}})
    (path / "export" / "adapter" / "part.txt").unlink()
    for stage in STAGES:
        inputs = record_files(path, stage.inputs)
        outputs = record_files(path, (*stage.outputs, *stage.optional))
        made.write_record(stage, **made.record(stage) | {"inputs": inputs, "outputs": outputs})
    return path


def publish(
    server, run: Path, *words: str, token: str = TOKEN, yes: str = "--yes", **variables: str
) -> subprocess.CompletedProcess:
    """`python -m utils publish RUN_DIR WORDS --yes` without a terminal, with a Hub of ours and no other network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_", "HUGGING"))}
    home = run.parent / "home"
    home.mkdir(exist_ok=True)
    environment = kept | {
        "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": server.address, "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token, "HTTP_PROXY": DEAD, "HTTPS_PROXY": DEAD, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        "COLUMNS": "200", "PYTHONPATH": python_path(), **variables,
    }  # fmt: skip
    command = [sys.executable, "-m", "utils", "publish", str(run), *words, *yes.split()]
    return subprocess.run(
        command,
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def contents(run: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.rglob("*")) if p.is_file()}


def test_adapter_and_merged_model_go_to_two_private_repositories_in_one_commit_each(hub_server, run):
    before = contents(run)
    done = publish(hub_server, run, "--repo", "alice/medical", "--merged")
    assert done.returncode == 0, done.stderr
    assert set(hub_server.repos) == {"alice/medical", "alice/medical-merged"}
    for name, kind in (("alice/medical", "adapter"), ("alice/medical-merged", "merged")):
        repo = hub_server.repos[name]
        assert repo["private"] is True and len(repo["commits"]) == 1
        folder = run / "export" / kind
        assert hub_server.files(name) == {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.iterdir()}
        assert hub_server.files(name)["README.md"].startswith(b"---\nlicense")
        assert f"{hub_server.address}/{name}/commit/" in done.stdout
    assert contents(run) == before


@pytest.mark.parametrize("way", ["dots", "link"])
def test_what_lies_outside_the_run_is_not_uploaded_although_a_manifest_names_it(run, way):
    secret = run.parent / "id_rsa"
    secret.write_text("a private key")
    name = "export/adapter/../../../id_rsa"
    if way == "link":
        name = "export/adapter/notes.txt"
        (run / name).symlink_to(secret)
    manifest = read_manifest(run)
    manifest["stages"]["05_export"]["outputs"][name] = {"sha256": hashlib.sha256(secret.read_bytes()).hexdigest()}
    write_json(run / "manifest.json", manifest)
    refused = {
        "dots": (RunDirError, "does not lie below the run directory"),
        "link": (ServiceError, "which lies outside"),
    }
    kind, said = refused[way]
    with pytest.raises(kind, match=said):
        plan_uploads(run, "alice/medical")


def test_what_will_leave_is_shown_with_its_size_and_the_verdict_before_anything_does(hub_server, run):
    done = publish(hub_server, run, "--repo", "alice/medical", "--dry-run", yes="")
    assert done.returncode == 0 and not hub_server.received
    assert "adapter to alice/medical (private)" in done.stdout and "adapter_model.safetensors" in done.stdout
    assert "After fine-tuning the model is worse." in done.stdout and "MiB" in done.stdout


def test_where_nobody_can_be_asked_yes_has_to_be_said(hub_server, run):
    done = publish(hub_server, run, "--repo", "alice/medical", yes="")
    assert done.returncode == 1 and "say --yes" in done.stderr and not hub_server.received


def test_public_has_to_be_said(hub_server, run):
    done = publish(hub_server, run, "--repo", "alice/medical", "--public")
    assert done.returncode == 0 and "PUBLIC" in done.stdout
    assert hub_server.repos["alice/medical"]["private"] is False


def test_a_repository_is_filled_only_where_as_many_see_it_as_was_said(hub_server, run):
    hub_server.repos["alice/medical"] = {"private": False, "commits": []}
    done = publish(hub_server, run, "--repo", "alice/medical")
    assert done.returncode == 1 and "alice/medical is public; publish with --public" in done.stderr
    hub_server.repos["alice/medical"] = {"private": True, "commits": []}
    done = publish(hub_server, run, "--repo", "alice/medical", "--public")
    assert (
        done.returncode == 1
        and "alice/medical is private; publish with --private, change that on the Hub" in done.stderr
    )
    assert not hub_server.repos["alice/medical"]["commits"]


@pytest.mark.parametrize(
    ("part", "status", "code", "said"),
    [
        ("repos/create", 401, 1, "does not accept the token from environment (HF_TOKEN)"),
        ("commit/main", 401, 1, "does not accept the token"),
        ("repos/create", 403, 1, "may not write there"),
        ("commit/main", 403, 1, "may not write there"),
        ("preupload/main", 400, 1, "The Hub refused"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_and_not_tried_again(hub_server, run, part, status, code, said):
    before = contents(run)
    hub_server.script[part] = [Answer({"error": f"no: {status}"}, status)] * 9
    done = publish(hub_server, run, "--repo", "alice/medical")
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(hub_server.calls(part)) == 1
    assert "Nothing on disk was changed" in done.stderr and contents(run) == before
    hub_server.script.clear()
    assert publish(hub_server, run, "--repo", "alice/medical").returncode == 0
    assert len(hub_server.repos["alice/medical"]["commits"]) == 1


@pytest.mark.parametrize("trouble", [{"status": 429}, {"status": 500}, {"cut": 0}], ids=["429", "500", "cut"])
def test_what_passes_ends_in_status_3_and_the_same_command_again_resumes(hub_server, run, trouble):
    hub_server.script["commit/main"] = [Answer(**{"body": {"error": "busy"}, **trouble})]
    done = publish(hub_server, run, "--repo", "alice/medical")
    assert done.returncode == 3 and "could not be reached" in done.stderr, done.stderr
    assert publish(hub_server, run, "--repo", "alice/medical").returncode == 0
    assert len(hub_server.repos["alice/medical"]["commits"]) == 1


def test_an_existing_repository_of_ours_is_filled_and_a_second_time_nothing_is_uploaded(hub_server, run):
    assert publish(hub_server, run, "--repo", "alice/medical").returncode == 0
    assert publish(hub_server, run, "--repo", "alice/medical").returncode == 0
    assert len(hub_server.calls("repos/create")) == 2 and len(hub_server.repos["alice/medical"]["commits"]) == 1


def test_a_hub_that_stays_away_ends_in_status_3_and_a_second_publish_finishes_the_job(hub_server, run):
    assert publish(hub_server, run, "--repo", "alice/medical").returncode == 0
    hub_server.script["alice/medical-merged/commit"] = [Answer({"error": "down"}, 503)]
    before = contents(run)
    done = publish(hub_server, run, "--repo", "alice/medical", "--merged")
    assert done.returncode == 3 and "could not be reached" in done.stderr and "503: down" in done.stderr
    assert contents(run) == before and not hub_server.repos["alice/medical-merged"]["commits"]
    assert publish(hub_server, run, "--repo", "alice/medical", "--merged").returncode == 0
    assert [len(repo["commits"]) for repo in hub_server.repos.values()] == [1, 1]


def test_the_token_goes_into_the_authorization_header_and_nowhere_else(hub_server, run):
    done = publish(hub_server, run, "--repo", "alice/medical", "--merged")
    assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr
    for request in hub_server.received:
        headers = {name: value for name, value in request.headers.items() if name.lower() != "authorization"}
        assert TOKEN not in f"{request.path} {headers}" and TOKEN.encode() not in request.body
    assert hub_server.calls("commit/main")[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_without_a_token_one_sentence_says_where_to_put_it(hub_server, run):
    done = publish(hub_server, run, "--repo", "alice/medical", token="")
    assert done.returncode == 1 and "There is no HF_TOKEN here" in done.stderr and not hub_server.received


def test_an_export_that_is_not_what_the_run_wrote_is_not_uploaded(hub_server, run):
    weights = run / "export" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    done = publish(hub_server, run, "--repo", "alice/medical")
    assert done.returncode == 1 and "adapter_model.safetensors differs" in done.stderr and not hub_server.received


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SIZE = 40_000_000


def record_exports(run: Path) -> None:
    manifest = read_manifest(run)
    stage = STAGES[5]
    manifest["stages"][stage.name]["outputs"] = record_files(run, (*stage.outputs, *stage.optional))
    write_json(run / "manifest.json", manifest)


@pytest.fixture
def hub_run(run, hub_server, monkeypatch, request) -> Path:
    """A run whose merged model has two shards; huggingface_hub talks to `hub_server` by LFS and never waits."""
    merged = run / "export/merged"
    (merged / "model.safetensors").unlink()
    for seed, name in enumerate(SHARDS):
        (merged / name).write_bytes(random.Random(seed).randbytes(getattr(request, "param", 4_000)))
    record_exports(run)
    close_session()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _: None)
    yield run
    close_session()


def put_bytes(server) -> dict[str, int]:
    """{sha256: bytes that arrived} of every PUT."""
    sent = Counter()
    for request in server.calls("/storage/"):
        sent[request.path.split("/")[2]] += len(request.body) if request.method == "PUT" else 0
    return dict(sent)


def upload(run: Path) -> str:
    (planned,) = plan_uploads(run, "alice/medical", ["merged"])
    return upload_model(planned, find_secret("HF_TOKEN"))


def digests(run: Path) -> list[str]:
    return [hashlib.sha256((run / "export/merged" / name).read_bytes()).hexdigest() for name in SHARDS]


@pytest.mark.parametrize("hub_run", [SIZE], indirect=True, ids=["40 MB"])
@pytest.mark.parametrize(
    ("part", "answers", "arrived", "said"),
    [
        ("objects/batch", [Answer({"error": "no"}, 401)], (0, 0), "does not accept the token"),
        ("objects/batch", [Answer({"error": "no"}, 403)], (0, 0), "may not write there"),
        ("/storage/SECOND", [Answer({"error": "expired"}, 403)], (1, 1), "403"),
        ("commit/main", [Answer({"error": "a commit came between"}, 409)], (1, 1), r"refused \(409: a commit came"),
        ("/storage/SECOND", [Answer({"error": "slow down"}, 429)] * 6, (1, 6), r"could not be reached \(429"),
        ("/storage/SECOND", [Answer({"error": "oh"}, 500)] * 6, (1, 6), r"could not be reached \(500"),
        ("/storage/SECOND", [Answer(hang_up=SIZE // 2)] * 6, (1, 3), "could not be reached"),
    ],
    ids=["401", "403", "403 of the storage", "409", "429", "500", "cut"],
)
def test_an_upload_of_80_mb_that_fails_loses_nothing_and_the_next_one_sends_only_what_is_missing(
    hub_server, hub_run, part, answers, arrived, said
):
    first, second = digests(hub_run)
    before = contents(hub_run)
    part = part.replace("SECOND", second)
    hub_server.script[part] = list(answers)
    with pytest.raises((ServiceError, InfrastructureError), match=said) as error:
        upload(hub_run)
    assert "Nothing on disk was changed; the same command again resumes." in str(error.value)
    assert not hub_server.script[part] and not hub_server.repos["alice/medical-merged"]["commits"]
    assert put_bytes(hub_server) == {oid: n * SIZE for oid, n in zip((first, second), arrived, strict=True) if n}
    kept = [oid for oid in (first, second) if oid in hub_server.objects]
    hub_server.received.clear()
    assert "/alice/medical-merged/commit/" in upload(hub_run)
    assert put_bytes(hub_server) == {oid: SIZE for oid in (first, second) if oid not in kept}
    (commit,) = hub_server.repos["alice/medical-merged"]["commits"]
    folder = hub_run / "export/merged"
    assert commit == {path.name: path.read_bytes() for path in folder.iterdir()} and contents(hub_run) == before


def test_a_part_that_was_cut_is_sent_again_by_itself_and_the_storage_never_sees_the_token(hub_server, hub_run):
    hub_server.chunk = 1_500
    first, second = digests(hub_run)
    hub_server.script[f"/storage/{second}/2"] = [Answer(hang_up=100), Answer({"error": "busy"}, 503)]
    upload(hub_run)
    stored = hub_server.calls("/storage/")
    parts = Counter(request.path for request in stored if request.method == "PUT")
    once = {f"/storage/{oid}/{number}": 1 for oid in (first, second) for number in (1, 2, 3)}
    assert parts == once | {f"/storage/{second}/2": 3}
    assert set(hub_server.files("alice/medical-merged")) == {*SHARDS, "README.md"}
    assert not [request for request in stored if TOKEN in f"{request.path} {request.headers}"]


def folders_of(run: Path) -> dict[str, Path]:
    return {kind: run / "export" / kind for kind in ("adapter", "merged", "gguf") if (run / "export" / kind).is_dir()}


def test_the_session_uploads_each_export_to_a_private_repository_of_its_own(hub_server, hub_run, capsys):
    write_text(hub_run / "export/gguf/model-q4_k_m.gguf", "GGUF")
    run = open_run("auto", hub_run, {"export.push_to_hub": "alice/medical"})
    push_to_hub(run, folders_of(hub_run))
    said = capsys.readouterr().out
    for name, file in (("", "adapter_model.safetensors"), ("-merged", SHARDS[0]), ("-GGUF", "model-q4_k_m.gguf")):
        assert hub_server.repos[f"alice/medical{name}"]["private"] and file in hub_server.files(f"alice/medical{name}")
        assert f"alice/medical{name}/commit/" in said


def test_an_upload_that_fails_in_the_session_is_a_sentence_with_the_line_that_finishes_it(hub_server, hub_run, capsys):
    hub_server.script["alice/medical-merged/commit"] = [Answer({"error": "no room"}, 403)]
    run = open_run("auto", hub_run, {"export.push_to_hub": "alice/medical"})
    push_to_hub(run, folders_of(hub_run))
    said = capsys.readouterr().out
    line = f"publish {hub_run} --repo alice/medical --merged resumes."
    assert "merged is not uploaded. " in said and "403: no room" in said and line in said
    assert len(hub_server.repos["alice/medical"]["commits"]) == 1


@pytest.mark.parametrize(("repo", "token"), [("alice/medical", ""), (None, TOKEN)])
def test_without_a_name_or_a_token_nothing_is_sent_and_the_session_says_how(
    hub_server, hub_run, monkeypatch, capsys, repo, token
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_HOME", str(hub_run.parent / "hf"))
    push_to_hub(open_run("auto", hub_run, {"export.push_to_hub": repo}), folders_of(hub_run))
    said = capsys.readouterr().out
    assert "Nothing is uploaded: " in said and f"publish {hub_run} --repo" in said and not hub_server.received
    assert ("no HF_TOKEN" in said) == (not token)


def put_into_scratch(run: Path, monkeypatch) -> Path:
    """The merged model where a session without room puts it, as 05 records it."""
    monkeypatch.setattr("utils.export.places.where", lambda: "kaggle")
    monkeypatch.setattr("tempfile.tempdir", str(run.parent / "scratch"))
    folder = scratch_folder(open_run("auto", run), "merged")
    folder.parent.mkdir(parents=True)
    (run / "export/merged").rename(folder)
    write_json(run / "export/verify.json", {"folders": {"merged": str(folder)}})
    record_exports(run)
    return folder


def test_publish_finds_what_the_same_session_had_to_put_into_scratch(hub_server, hub_run, monkeypatch):
    folder = put_into_scratch(hub_run, monkeypatch)
    upload(hub_run)
    assert set(hub_server.files("alice/medical-merged")) == {*SHARDS, "README.md"}
    shutil.rmtree(folder)
    with pytest.raises(ServiceError, match="ended with its session's scratch"):
        plan_uploads(hub_run, "alice/medical", ["merged"])


def test_a_record_that_names_another_folder_than_this_runs_scratch_uploads_nothing(hub_run, monkeypatch):
    folder, private = put_into_scratch(hub_run, monkeypatch), hub_run.parent / "private"
    private.mkdir()
    (private / "id_rsa").write_text("a private key")
    (folder / "notes.txt").symlink_to(private / "id_rsa")
    with pytest.raises(ServiceError, match="lies outside the export"):
        plan_uploads(hub_run, "alice/medical", ["merged"])
    write_json(hub_run / "export/verify.json", {"folders": {"merged": str(private)}})
    record_exports(hub_run)
    with pytest.raises(ServiceError, match="is not there"):
        plan_uploads(hub_run, "alice/medical", ["merged"])


def test_publish_sends_the_gguf_files_where_it_is_asked_to(hub_server, run):
    write_text(run / "export/gguf/model-q4_k_m.gguf", "GGUF")
    record_exports(run)
    done = publish(hub_server, run, "--repo", "alice/medical", "--gguf")
    assert done.returncode == 0, done.stderr
    assert set(hub_server.repos) == {"alice/medical", "alice/medical-GGUF"}
    assert hub_server.files("alice/medical-GGUF") == {"model-q4_k_m.gguf": b"GGUF"}


def change(run: Path, stage: str, **values) -> None:
    manifest = read_manifest(run)
    manifest["stages"][stage] |= values
    write_json(run / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("stage", "values", "said"),
    [
        ("05_export", {"state": "running"}, "05_export is out of date: it was interrupted"),
        ("03_lora_training", {"state": "failed"}, "03_lora_training is out of date: it failed"),
        ("04_comparison", {"state": ""}, "04_comparison is out of date: it has not run"),
        ("05_export", {"inputs": {}}, "05_export is out of date: one of its inputs changed"),
        ("03_lora_training", {"settings": {"lora": {"r": 8}}}, "03_lora_training is out of date: its settings changed"),
    ],
)
def test_an_export_that_is_not_the_runs_last_word_is_not_uploaded(run, stage, values, said):
    assert plan_uploads(run, "alice/medical")
    change(run, stage, **values)
    with pytest.raises(ServiceError, match=said):
        plan_uploads(run, "alice/medical")


def test_an_export_that_recorded_no_file_is_not_uploaded(run):
    """Found by `make faults`: a manifest that says done and names no outputs ended in a traceback."""
    manifest = read_manifest(run)
    del manifest["stages"]["05_export"]["outputs"]
    write_json(run / "manifest.json", manifest)
    with pytest.raises(ServiceError, match="is not there"):
        plan_uploads(run, "alice/medical")


def test_only_what_the_export_recorded_is_uploaded(run):
    for name in (".ipynb_checkpoints/README-checkpoint.md", "notes.txt"):
        write_text(run / "export" / "adapter" / name, "mine")
    (upload,) = plan_uploads(run, "alice/medical")
    assert set(upload.files) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}


@pytest.mark.parametrize(
    ("repo", "merged", "said"),
    [
        ("medical", False, "expected USER/NAME"),
        ("a/b/c", False, "expected USER/NAME"),
        ("a/b", True, "its session's scratch"),
    ],
)
def test_a_wrong_name_or_a_model_that_is_not_here_is_a_sentence(run, repo, merged, said):
    shutil.rmtree(run / "export" / "merged")
    with pytest.raises(ServiceError, match=said):
        plan_uploads(run, repo, ["adapter", "merged"] if merged else ["adapter"])


def test_there_has_to_be_something_to_upload(hub_server, run):
    done = publish(hub_server, run)
    assert done.returncode == 1 and "nothing to upload" in done.stderr


def test_offline_tracking_that_cannot_be_sent_stays_and_is_told(hub_server, run):
    """The real wandb, a key that looks right, and nobody at the other end."""
    pytest.importorskip("wandb")
    code = (
        "import wandb; run = wandb.init(project='p', mode='offline', settings=wandb.Settings(console='off'));"
        "run.log({'loss': 1}); run.finish()"
    )
    (run / "tracking").mkdir()
    # Without WANDB_SERVICE, which another test's wandb leaves in this process: it names a service that has ended.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_DIR": str(run / "tracking"), "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=run.parent, check=True, timeout=120)
    (folder,) = offline_runs(run)
    before = contents(run)
    key = "c" * 40
    done = publish(hub_server, run, WANDB_API_KEY=key, WANDB_BASE_URL=hub_server.address)
    assert done.returncode == 3 and "wandb took 0 of 1 offline runs" in done.stderr, done.stdout + done.stderr
    assert key not in done.stdout + done.stderr and offline_runs(run) == [folder]
    assert {name: digest for name, digest in contents(run).items() if name in before} == before
