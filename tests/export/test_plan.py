"""What is exported where: all of it at home, what has room on Kaggle, said before it is made."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from tests import fake_tokens
from tests.exported import make_run, write_evidence
from utils.config import load_config
from utils.errors import HardwareError, ModelError
from utils.export import gguf as gguf_files
from utils.export import places, plan
from utils.export.adapter import copy_adapter, merge_adapter
from utils.export.gguf import BITS, file_name, write_gguf
from utils.export.model_card import write_cards
from utils.export.plan import Plan, output_room, plan_exports
from utils.pipeline.stage import StageRun
from utils.pipeline.stages import BY_NAME
from utils.project import ROOT

WEIGHTS = 16_060_522_496  # of the 8B model, in 16 bit
ADAPTER = 168e6
SAVED = 19.5 * 2**30  # what a Kaggle session's output can hold


def write_sparse(path: Path, size: float) -> Path:
    """A file that has this size and takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.truncate(int(size))
    return path


class Session:
    """A machine with /kaggle/working below `root`, an 8B base as sparse files, and a run whose adapter is exported."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, here: str = "kaggle", llama_cpp: str = "found"):
        self.working, self.patch = root / "kaggle" / "working", monkeypatch
        base, tree = root / "base", root / "llama.cpp"
        write_sparse(base / "model.safetensors", WEIGHTS)
        tree.mkdir()
        self.fetched = []
        for module in (places, plan):
            monkeypatch.setattr(module, "where", lambda: here)
        monkeypatch.setattr(plan, "KAGGLE", root / "kaggle")
        monkeypatch.setattr("tempfile.tempdir", str(root / "scratch"))
        monkeypatch.setenv("HF_HOME", str(root / "hf"))
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(plan, "find_llama_cpp", lambda: tree if llama_cpp == "found" else None)
        fetch = lambda: self.fetched.append(1) or (tree if llama_cpp == "fetched" else None)  # noqa: E731
        monkeypatch.setattr(plan, "fetch_llama_cpp", fetch)
        monkeypatch.setattr(gguf_files, "merge_adapter", self.merge)
        monkeypatch.setattr(gguf_files, "where", lambda: here)
        monkeypatch.setattr(gguf_files, "require_disk", lambda *_: None)
        monkeypatch.setattr(gguf_files, "_call", self.call)
        self.base, self.made = base, []

    def run(self, **settings) -> StageRun:
        given = {
            "model.name": str(self.base),
            "prompt.style": "native",
            **{f"export.{key}": value for key, value in settings.items()},
        }
        run = StageRun(self.working / "runs" / "t4", load_config("t4", given), BY_NAME["05_export"])
        write_sparse(run.file("export/adapter/adapter_model.safetensors"), ADAPTER)
        return run

    def merge(self, run: StageRun, folder: Path) -> Path:
        write_sparse(folder / "model.safetensors", WEIGHTS)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    def call(self, words) -> None:
        """In place of llama.cpp's programs: files of the size that theirs would have."""
        words = list(map(str, words))
        if "--outfile" in words:
            size = WEIGHTS if "f16" in words else ADAPTER
            write_sparse(Path(words[words.index("--outfile") + 1]), size)
        else:
            write_sparse(Path(words[2]), WEIGHTS * BITS[words[3].lower()] / 16)
        self.made.append(self.size())

    def export(self, run: StageRun) -> Plan:
        """What 05 does, with sparse files."""
        planned = plan_exports(run)
        if "merged" in planned.places:
            self.merge(run, planned.places["merged"])
        write_gguf(run, planned)
        self.made.append(self.size())
        return planned

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.working.rglob("*") if path.is_file())

    def kept(self, run: StageRun) -> list[str]:
        return sorted(path.name for path in run.file("export").iterdir() if not path.name.startswith("."))


@pytest.fixture
def session(tmp_path, monkeypatch) -> Session:
    return Session(tmp_path, monkeypatch)


TOKEN = fake_tokens.hugging_face("plan")
# What is set, GB of other files in the output, and whether there is a token.
CASES = {
    "nothing": ({}, 1, False),
    "`merged=true`": ({"merged": True}, 1, False),
    "`merged=true` `gguf=[]`": ({"merged": True, "gguf": []}, 1, False),
    "`merged=true` `push_to_hub=you/name`": ({"merged": True, "push_to_hub": "you/name"}, 1, True),
    "`gguf=[q4_k_m, q8_0, f16]`": ({"gguf": ["q4_k_m", "q8_0", "f16"]}, 1, False),
    "nothing, 15 GB of other files": ({}, 15, False),
}
KEPT = {
    "nothing": (["adapter", "gguf"], []),
    "`merged=true`": (["adapter", "gguf"], []),
    "`merged=true` `gguf=[]`": (["adapter", "merged"], []),
    "`merged=true` `push_to_hub=you/name`": (["adapter", "gguf"], ["merged"]),
    "`gguf=[q4_k_m, q8_0, f16]`": (["adapter", "gguf"], []),
    "nothing, 15 GB of other files": (["adapter"], []),
}


def try_case(root: Path, patch: pytest.MonkeyPatch, name: str) -> tuple[Session, StageRun, Plan]:
    settings, others, token = CASES[name]
    session = Session(root, patch)
    write_sparse(session.working / "other.bin", others * 1e9)
    if token:
        patch.setenv("HF_TOKEN", TOKEN)
    run = session.run(**settings)
    return session, run, session.export(run)


@pytest.mark.parametrize("name", CASES)
def test_kaggles_output_never_holds_more_than_it_keeps_and_what_is_left_out_is_said_first(tmp_path, monkeypatch, name):
    session, run, planned = try_case(tmp_path, monkeypatch, name)
    kept, uploaded = KEPT[name]
    assert session.kept(run) == kept and max(session.made) < SAVED and session.size() < 19.2e9
    assert [kind for kind, folder in planned.places.items() if not folder.is_relative_to(run.path)] == uploaded
    for kind in ("gguf", "merged"):
        named = [
            what for what in planned.left_out if what.split()[0] == kind and f"{what} is not made: " in str(planned)
        ]
        assert kind in planned.places or named or (kind == "gguf" and "gguf=[]" in name)
    left = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert bool(left) == bool(uploaded), left  # what was only on the way is gone


def test_the_table_in_the_docs_is_what_a_simulated_session_does(tmp_path, monkeypatch):
    lines = ["| set in `export.` | kept, GB | uploaded only | said before: not made |", "| --- | --- | --- | --- |"]
    for number, name in enumerate(CASES):
        with monkeypatch.context() as patch:
            session, run, planned = try_case(tmp_path / str(number), patch, name)
            kept = {
                kind: sum(p.stat().st_size for p in run.file(f"export/{kind}").iterdir()) for kind in session.kept(run)
            }
        here = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in kept.items())
        away = ", ".join(kind for kind in planned.places if kind not in kept) or "–"
        said = "; ".join(f"{what}: {why.partition(';')[0]}" for what, why in planned.left_out.items()) or "–"
        lines.append(f"| {name} | {here} | {away} | {said} |")
    table = "\n".join(lines)
    assert table in (ROOT / "docs" / "exports.md").read_text(encoding="utf-8"), table


def test_the_largest_gguf_that_does_not_fit_is_named_with_both_sizes_and_the_way_out(session):
    write_sparse(session.working / "other.bin", 1e9)
    planned = plan_exports(session.run(gguf=["f16", "q8_0", "q4_k_m"]))
    assert planned.kinds == ["q4_k_m", "q8_0"]
    assert planned.left_out["gguf f16"].startswith(
        "16.1 GB, and 4.38 GB are left; with export.push_to_hub and HF_TOKEN"
    )


def test_an_earlier_export_makes_room_and_everything_else_counts(session):
    run = session.run()
    write_sparse(session.working / "other.bin", 2e9)
    before = output_room(run)
    assert before == plan._OUTPUT_BYTES - 2e9 - ADAPTER
    write_sparse(run.file("export/merged/model.safetensors"), WEIGHTS)
    assert output_room(run) == before - WEIGHTS
    plan_exports(run)
    assert output_room(run) == before and not run.file("export/merged").exists()


@pytest.mark.parametrize("token", [True, False])
def test_an_upload_without_a_token_is_none_and_nothing_is_made_for_it(session, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", TOKEN if token else "")
    planned = plan_exports(session.run(merged=True, push_to_hub="you/name"))
    assert ("merged" in planned.places) == token == ("uploaded, and gone with the session" in str(planned))


@pytest.mark.parametrize(
    ("here", "llama_cpp", "kinds", "fetched"),
    [
        ("kaggle", "fetched", ["q4_k_m"], [1]),
        ("colab", "fetched", ["q4_k_m"], [1]),
        ("kaggle", "none", [], [1]),
        ("local", "found", ["q4_k_m", "q8_0", "f16"], []),
        ("local", "none", [], []),
    ],
)
def test_llama_cpp_is_fetched_on_kaggle_and_colab_and_never_compiled_there(
    tmp_path, monkeypatch, here, llama_cpp, kinds, fetched
):
    session = Session(tmp_path, monkeypatch, here, llama_cpp)
    monkeypatch.setattr(plan, "free_disk_gib", lambda _: 40.0)
    planned = plan_exports(session.run())
    assert planned.kinds == kinds and session.fetched == fetched
    assert ("merged" in planned.places) == (here == "local")
    assert ("gguf is not made: no llama.cpp was found" in str(planned)) == (not kinds)
    assert (
        plan_exports(session.run(install_llama_cpp=here == "local")).kinds == kinds[: 3 if llama_cpp == "found" else 0]
    )
    assert len(session.fetched) == len(fetched) + (here == "local" and llama_cpp == "none")


def test_on_a_drive_that_is_full_the_merged_model_is_left_out(tmp_path, monkeypatch):
    session = Session(tmp_path, monkeypatch, "colab")
    monkeypatch.setattr(plan, "free_disk_gib", lambda _: 12.0)
    planned = plan_exports(session.run(merged=True))
    assert set(planned.places) == {"gguf"} and "16.1 GB, and 7.97 GB are left" in planned.left_out["merged"]


def test_without_a_merged_model_gguf_is_made_of_one_that_is_deleted(tmp_path, monkeypatch):
    session = Session(tmp_path, monkeypatch, "local")
    run = session.run(merged=False, gguf=["q8_0"])
    planned = session.export(run)
    assert session.kept(run) == ["adapter", "gguf"] and "merged is not made" in str(planned)
    assert {path.name for path in run.file("export/gguf").iterdir()} == {
        file_name("q8_0"),
        "Modelfile",
    }
    assert not [path for path in run.path.rglob("*") if path.is_file() and path.stat().st_size > 15e9]


@pytest.mark.parametrize("here", ["kaggle", "colab", "local"])
def test_gguf_that_fails_costs_no_stage_on_kaggle_and_colab_and_ends_it_at_home(tmp_path, monkeypatch, here, capsys):
    session = Session(tmp_path, monkeypatch, here)
    monkeypatch.setattr(plan, "free_disk_gib", lambda _: 40.0)

    def fail(run, folder):
        session.merge(run, folder)
        raise ModelError("The 16-bit base cannot be fetched.")

    monkeypatch.setattr(gguf_files, "merge_adapter", fail)
    run = session.run(merged=False)
    with pytest.raises(ModelError) if here == "local" else nullcontext():
        session.export(run)
    told = "gguf is not made: The 16-bit base cannot be fetched." in capsys.readouterr().out
    assert told == (here != "local") and session.kept(run) == ["adapter"]
    assert not [path for path in tmp_path.rglob("*.safetensors") if path.parent.name == "merged"]


def test_the_readme_of_the_exports_names_what_was_made_and_says_what_is_not_kept(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path / "run")
    write_evidence(run)
    folders = {"adapter": copy_adapter(run), "merged": merge_adapter(run, tmp_path / "scratch")}
    write_cards(run, folders, {})
    text = run.file("export/README.md").read_text(encoding="utf-8")
    assert (
        "- `adapter/`: a LoRA adapter, to be loaded on its base model; a repository of its own, with its card\n" in text
    )
    assert "with its card; too large to be kept here" in text and "gguf" not in text


def test_where_the_base_comes_shard_by_shard_the_disk_has_to_hold_one(session, monkeypatch):
    shards = {"model-1.safetensors": 5 * 2**30, "model-2.safetensors": 3 * 2**30}
    monkeypatch.setattr(plan, "measure_base", lambda _: (shards, "c" * 40))
    monkeypatch.setattr("utils.hardware.free_disk_gib", lambda _: 5.1)
    planned = plan_exports(session.run())
    assert "shard by shard: this disk has no room for it" in str(planned) and planned.kinds == ["q4_k_m"]
    monkeypatch.setattr("utils.hardware.free_disk_gib", lambda _: 4.9)
    with pytest.raises(HardwareError, match=r"Fetching one shard of the base needs 5\.0 GiB of free disk .* 4\.9 GiB"):
        plan_exports(session.run())


@pytest.mark.parametrize("here", ["kaggle", "local"])
def test_a_base_that_cannot_be_had_costs_no_stage_on_kaggle_unless_the_merged_model_was_asked_for(
    tmp_path, monkeypatch, here
):
    def fail(_):
        raise ModelError("The 16-bit base cannot be fetched.")

    session = Session(tmp_path, monkeypatch, here)
    monkeypatch.setattr(plan, "measure_base", fail)
    with pytest.raises(ModelError) if here == "local" else nullcontext():
        planned = session.export(session.run())
        assert "gguf is not made: The 16-bit base cannot be fetched." in str(planned) and planned.places == {}
    with pytest.raises(ModelError, match="cannot be fetched"):
        plan_exports(session.run(merged=True))
