"""Exported folders are complete, name no path of this machine, and one that is there is whole."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.exported import QUESTIONS, make_run
from tests.loopback import Answer, Loopback, Received
from utils.config import load_config
from utils.errors import HardwareError, ModelError
from utils.export.adapter import (
    copy_adapter,
    find_base,
    measure_base,
    merge_adapter,
    merged_into,
    sixteen_bit_source,
    trained_on,
)
from utils.export.chat_template import chat_ids, prompt_ids
from utils.models.tokenizer import load_tokenizer
from utils.pipeline.run_dir import RunDir, open_run
from utils.pipeline.stage import StageRun
from utils.pipeline.stages import BY_NAME
from utils.project import ROOT


@pytest.fixture
def trained_run(tiny_folder, tmp_path) -> RunDir:
    return make_run(tiny_folder, tmp_path / "run")


@pytest.fixture
def merged_run(trained_run) -> RunDir:
    copy_adapter(trained_run)
    merge_adapter(trained_run, trained_run.file("export/merged"))
    return trained_run


def weights_of(run) -> bytes:
    return run.file("export/merged/model.safetensors").read_bytes()


def test_both_folders_are_complete_and_name_no_path_of_this_machine(merged_run):
    adapter, merged = (merged_run.file(f"export/{kind}") for kind in ("adapter", "merged"))
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in adapter.iterdir()} == tokenizer | {"adapter_config.json", "adapter_model.safetensors"}
    expected = tokenizer | {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in merged.iterdir()} == expected
    for path in (*adapter.glob("*.json"), *merged.glob("*.json")):
        assert str(merged_run.path.parent) not in path.read_text() and "/tmp" not in path.read_text()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("tiny", None)


def test_the_adapter_names_the_commit_that_it_was_trained_on(trained_run):
    hub = {"name": "owner/base", "revision": "c" * 40}
    section = trained_run.config.model.model_copy(update=hub)
    assert trained_on(trained_run.config.model_copy(update={"model": section})) == ("owner/base", "c" * 40)


@pytest.mark.parametrize("style", ["native", "tutorial"])
def test_the_exported_tokenizer_loads_by_auto_class_and_gives_the_training_prompt(tiny_folder, tmp_path, style):
    """transformers 4 knows no TokenizersBackend, and LlamaTokenizerFast would lose every space (transformers 45488)."""
    from transformers import AutoTokenizer

    run = make_run(tiny_folder, tmp_path / "run", prompt__style=style)
    copy_adapter(run)
    merge_adapter(run, run.file("export/merged"))
    for kind in ("adapter", "merged"):
        folder = run.file(f"export/{kind}")
        assert (
            json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
        )
        theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(tiny_folder)
        for question in QUESTIONS:
            assert chat_ids(theirs, question) == prompt_ids(ours, question, style)


def test_a_merged_folder_is_the_same_whenever_it_is_made(merged_run):
    before = {path.name: path.read_bytes() for path in merged_run.file("export/merged").iterdir()}
    merge_adapter(merged_run, merged_run.file("export/merged"))
    assert {path.name: path.read_bytes() for path in merged_run.file("export/merged").iterdir()} == before


def test_an_adapter_that_is_not_finite_is_refused_and_the_earlier_export_stays(merged_run):
    before = weights_of(merged_run)
    weights = merged_run.file("export/adapter/adapter_model.safetensors")
    tensors = load_file(weights)
    next(value for key, value in tensors.items() if "lora_B" in key)[0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is not finite once the adapter is added"):
        merge_adapter(merged_run, merged_run.file("export/merged"))
    assert weights_of(merged_run) == before
    assert not merged_run.file("export/.merged.tmp").exists()


def test_where_a_disk_fills_up_the_earlier_export_stays(merged_run, monkeypatch):
    before = weights_of(merged_run)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("utils.export.merge.save_file", full)
    with pytest.raises(SafetensorError, match="No space left"):
        merge_adapter(merged_run, merged_run.file("export/merged"))
    assert weights_of(merged_run) == before and not merged_run.file("export/.merged.tmp").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(merged_run, monkeypatch):
    from utils import hardware as platforms

    before = weights_of(merged_run)
    monkeypatch.setattr(platforms, "free_disk_gib", lambda _: 0.01)
    with pytest.raises(HardwareError, match=r"export/merged needs 0\.1 GiB of free disk at .*; found 0\.0 GiB"):
        merge_adapter(merged_run, merged_run.file("export/merged"))
    assert weights_of(merged_run) == before


def test_a_merge_that_was_killed_leaves_the_earlier_export_and_the_next_one_is_whole(merged_run):
    before = weights_of(merged_run)
    code = f"""
import os, signal
from utils.export import merge
from utils.export.adapter import merge_adapter
from utils.pipeline.run_dir import open_run

write = merge.save_file

def write_and_die(*arguments, **options):
    write(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

merge.save_file = write_and_die
run = open_run("auto", {str(merged_run.path)!r})
merge_adapter(run, run.file("export/merged"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert merged_run.file("export/.merged.tmp/model.safetensors").exists()  # it was in the midst of it
    assert weights_of(merged_run) == before
    merge_adapter(merged_run, merged_run.file("export/merged"))
    assert weights_of(merged_run) == before and not merged_run.file("export/.merged.tmp").exists()


def test_the_commit_of_a_base_from_the_hub_is_pinned(merged_run, tiny_folder, monkeypatch):
    monkeypatch.setattr("utils.export.adapter.find_base", lambda _: (tiny_folder, "c" * 40))
    run = StageRun(merged_run.path, merged_run.config, BY_NAME["05_export"])
    merge_adapter(run, run.file("export/merged"))
    assert open_run("auto", run.path).config.export.base_revision == "c" * 40


def test_an_earlier_export_is_gone_where_none_is_wanted(merged_run):
    assert merge_adapter(merged_run, None) is None
    assert not merged_run.file("export/merged").exists()


def test_the_merged_model_loads_and_differs_from_the_base(merged_run, tiny_folder):
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 9, 30, 41]])
    with torch.inference_mode():
        base, merged = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (tiny_folder, merged_run.file("export/merged"))
        )
    assert (base - merged).abs().max() > 1e-3


HUB = "unsloth/DeepSeek-R1-Distill-Llama-8B"


@pytest.mark.parametrize("suffix", ["-bnb-4bit", "-unsloth-bnb-4bit"])
def test_a_prequantised_repository_is_merged_into_its_sixteen_bit_sibling(suffix):
    config = load_config("t4", {"model.name": HUB + suffix, "model.revision": "a" * 40})
    assert sixteen_bit_source(config) == (HUB, None)  # that commit is another repository's
    pinned = load_config("t4", {"model.name": HUB + suffix, "export.base_revision": "b" * 40})
    assert sixteen_bit_source(pinned) == (HUB, "b" * 40)
    assert trained_on(config) == (HUB + suffix, "a" * 40)


def test_a_sixteen_bit_repository_is_its_own_base_at_the_pinned_commit():
    config = load_config("t4", {"model.name": HUB, "model.revision": "a" * 40})
    assert sixteen_bit_source(config) == (HUB, "a" * 40)


def test_a_named_base_comes_first(tiny_folder):
    config = load_config("t4", {"export.base": str(tiny_folder)})
    assert find_base(config) == (tiny_folder, None) and merged_into(config) == ("tiny", None)


def test_the_hub_is_asked_for_weights_and_settings_of_one_commit_only(monkeypatch, tmp_path):
    asked = {}

    def download(source, **options):
        asked.update(options, source=source)
        return str(tmp_path / ("d" * 40))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = load_config("t4", {"model.name": HUB, "model.revision": "a" * 40})
    assert find_base(config)[1] == "d" * 40 and merged_into(config) == (HUB, "a" * 40)
    assert asked["revision"] == "a" * 40 and asked["source"] == HUB
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects(
        ["model-1.safetensors", "config.json", "model.bin", "original/params.json", "x.gguf", "a/b.safetensors"],
        allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"],
    )  # fmt: skip
    assert list(kept) == ["model-1.safetensors", "config.json"]


def test_a_base_out_of_reach_is_a_sentence(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"is no folder and cannot be fetched .*export\.base=FOLDER"):
        find_base(load_config("t4", {"model.name": HUB}))


SHA, BASE = "e" * 40, "owner/base"


class BaseServer(Loopback):
    """The Hub's answers about one repository; `look` is called whenever one of its shards is asked for."""

    def __init__(self, folder):
        super().__init__()
        self.content = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.look, self.refused = lambda: None, ""

    def respond(self, request: Received) -> Answer:
        path = request.path.partition("?")[0]
        if path.startswith(f"/api/models/{BASE}/tree/"):
            files = self.content.items()
            return Answer([{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in files])
        if path.startswith(f"/api/models/{BASE}"):
            return Answer({"id": BASE, "sha": SHA, "siblings": []})
        name = path.removeprefix(f"/{BASE}/resolve/{SHA}/")
        if name not in self.content:
            return Answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        if request.method == "GET" and name.endswith(".safetensors"):
            self.look()
            if name == self.refused:
                return Answer({}, 403, {"X-Error-Code": "GatedRepo"})
        etag = hashlib.sha256(self.content[name]).hexdigest()
        return Answer(self.content[name], headers={"ETag": f'"{etag}"', "X-Repo-Commit": SHA})


@pytest.fixture
def sharded(tiny_folder, tmp_path, monkeypatch):
    """A Hub on 127.0.0.1 with the tiny model in several shards, and an empty cache in `sharded.cache`."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(folder, max_shard_size="100KB")
    server = BaseServer(folder)
    server.cache = tmp_path / "hf"
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(server.cache / "hub"))
    for name, value in {
        "HF_HOME": str(server.cache),
        "HF_TOKEN": "",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
def hub_run(sharded, tiny_folder, tmp_path) -> StageRun:
    run = make_run(tiny_folder, tmp_path / "run", export__base=BASE)
    copy_adapter(run)
    return StageRun(run.path, run.config, BY_NAME["05_export"])


def contents_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def have_free(monkeypatch, bases: float, sharded: BaseServer) -> None:
    """So much free disk as the base's weights take, times `bases`."""
    weights = sum(len(body) for name, body in sharded.content.items() if name.endswith(".safetensors"))
    monkeypatch.setattr("utils.export.adapter.free_disk_gib", lambda _: bases * weights / 2**30)


def test_where_the_disk_is_short_one_shard_of_the_base_lies_there_at_a_time(sharded, hub_run, monkeypatch):
    shards, lying = {name for name in sharded.content if name.endswith(".safetensors")}, []
    assert min(len(sharded.content[name]) for name in shards) > 20_000
    target = hub_run.file("export/merged")

    def look():
        places = (sharded.cache, hub_run.file("export/.scratch.tmp"))
        files = [path for place in places for path in place.rglob("*") if path.is_file()]
        lying.append([path.name for path in files if path.stat().st_size > 20_000])

    sharded.look = look
    have_free(monkeypatch, 1.9, sharded)
    merge_adapter(hub_run, target)
    assert len(shards) > 2 and lying == [[]] * len(shards)  # none is there when the next one is asked for
    assert {path.name for path in target.glob("*.safetensors")} == shards
    assert not list(sharded.cache.rglob("*.safetensors")) and not hub_run.file("export/.scratch.tmp/base").exists()
    assert open_run("auto", hub_run.path).config.export.base_revision == SHA
    short = contents_of(target)
    have_free(monkeypatch, 3.1, sharded)
    merge_adapter(hub_run, target)
    assert contents_of(target) == short
    assert {path.name for path in sharded.cache.rglob("*.safetensors")} == shards  # where there is room, it stays


def test_a_base_that_is_in_the_cache_is_merged_from_there_on_any_disk_and_without_the_hub(
    sharded, hub_run, monkeypatch
):
    have_free(monkeypatch, 4, sharded)
    merge_adapter(hub_run, hub_run.file("export/merged"))
    have_free(monkeypatch, 0.1, sharded)
    sharded.received.clear()
    sizes, commit = measure_base(hub_run.config)
    assert sizes == {name: len(body) for name, body in sharded.content.items() if name in sizes}
    assert len(sizes) > 2 and commit is None and not sharded.received
    merge_adapter(hub_run, hub_run.file("export/merged"))
    assert not [request for request in sharded.received if request.method == "GET" and "safetensors" in request.path]


def test_a_base_on_the_hub_is_measured_by_its_index_before_a_shard_is_fetched(sharded, hub_run, monkeypatch):
    shards = {name: len(body) for name, body in sharded.content.items() if name.endswith(".safetensors")}
    have_free(monkeypatch, 3.1, sharded)
    sharded.content["consolidated.safetensors"] = b"the same weights again, in their maker's own form"
    sizes, commit = measure_base(hub_run.config)
    assert sizes == shards
    have_free(monkeypatch, 2.9, sharded)
    assert commit is None and measure_base(hub_run.config) == (sizes, SHA)
    asked = [request.path for request in sharded.received if request.method == "GET" and "/resolve/" in request.path]
    assert {path.rsplit("/", 1)[-1] for path in asked} <= {"model.safetensors.index.json"}


def test_a_shard_that_cannot_be_fetched_ends_the_merge_in_a_sentence_and_the_next_one_is_whole(
    sharded, hub_run, monkeypatch
):
    have_free(monkeypatch, 1.9, sharded)
    sharded.refused, target = "model-00002-of-00003.safetensors", hub_run.file("export/merged")
    with pytest.raises(ModelError, match=r"owner/base is no folder and cannot be fetched .*export\.base=FOLDER"):
        merge_adapter(hub_run, target)
    assert not target.exists() and not hub_run.file("export/.merged.tmp").exists()
    sharded.refused = ""
    merge_adapter(hub_run, target)
    short = contents_of(target)
    shutil.rmtree(target)
    have_free(monkeypatch, 4, sharded)
    merge_adapter(hub_run, target)
    assert contents_of(target) == short


def test_a_disk_that_cannot_hold_one_shard_beside_the_merged_model_is_told_with_both(sharded, hub_run, monkeypatch):
    have_free(monkeypatch, 1.9, sharded)
    found = {}
    monkeypatch.setattr("utils.export.adapter.require_disk", lambda path, gib, what: found.update({what: gib}))
    merge_adapter(hub_run, hub_run.file("export/merged"))
    sizes = [len(body) for name, body in sharded.content.items() if name.endswith(".safetensors")]
    assert found == {"export/merged": pytest.approx((sum(sizes) + max(sizes)) / 2**30 + 0.05)}


def test_a_repository_without_safetensors_is_told(sharded, hub_run):
    for name in [name for name in sharded.content if name.endswith(".safetensors")]:
        del sharded.content[name]
    with pytest.raises(ModelError, match=r"owner/base holds no safetensors files; name another model in export\.base"):
        measure_base(hub_run.config)
