"""The whole demo, run once by papermill; every test here reads that run or continues a copy of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.smollm2 import read_run
from tests.conftest import run_command
from utils.pipeline.run_dir import open_run
from utils.pipeline.stages import STAGES
from utils.project import ROOT


def metrics_of(path: Path) -> dict:
    return json.loads((path / "comparison" / "metrics.json").read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def papermill(notebook: str, output: Path, *parameters: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "notebooks" / f"{notebook}.ipynb"),
        str(output),
        *parameters,
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


def test_the_demo_takes_less_than_five_minutes_of_one_core_and_every_stage_is_done(demo_run):
    assert demo_run.returncode == 0, demo_run.output
    assert demo_run.seconds < 300
    stages = json.loads((demo_run.path / "manifest.json").read_text())["stages"]
    assert [record["state"] for record in stages.values()] == ["done"] * 6
    for stage, record in zip(STAGES, stages.values(), strict=True):
        assert record["seconds"] > 0 and record["peak_memory"]["rss_gib"] > 0 and record["versions"]["transformers"]
        assert all((demo_run.path / name).exists() for name in stage.outputs)


def test_the_fine_tuned_model_is_better_on_at_least_200_held_out_questions(demo_run):
    metrics = metrics_of(demo_run.path)
    primary = metrics["primary"]
    assert set(primary) >= {"name", "n", "base", "tuned", "difference", "ci95", "p_value"}
    assert primary["name"] == "accuracy" and primary["n"] >= 200 and primary["groups"] == 32
    assert primary["tuned"] > primary["base"] and primary["p_value"] < 0.01 and primary["ci95"][0] > 0
    assert metrics["verdict"] == "better" and "better" in metrics["sentence"]
    found = read_run(demo_run.path)["metrics"]
    assert found["reasoning_tokens"]["tuned"] < found["reasoning_tokens"]["base"]
    assert found["bullets"]["base"] > 0.9 and found["bullets"]["tuned"] < 0.1


def test_the_base_is_loaded_five_times_on_one_device_and_the_merged_model_once(demo_run):
    stages = json.loads((demo_run.path / "manifest.json").read_text())["stages"]
    base = {stage[:2]: sum(n for name, n in record["model_loads"].items() if name != "merged")
            for stage, record in stages.items()}  # fmt: skip
    assert base == {"00": 0, "01": 1, "02": 0, "03": 1, "04": 1, "05": 2}
    assert stages["05_export"]["model_loads"]["merged"] == 1


def test_held_out_questions_are_not_in_the_training_rows(demo_run):
    train, held_out = (pd.read_parquet(demo_run.path / "data" / f"{name}.parquet") for name in ("train", "eval"))
    assert not set(train["id"]) & set(held_out["id"])


def test_the_summary_says_what_was_written_and_what_comes_next(demo_run):
    assert "report/index.html" in demo_run.output and "export/adapter" in demo_run.output
    assert "--set KEY=VALUE" in demo_run.output
    assert metrics_of(demo_run.path)["sentence"] in re.sub(r"\s+", " ", demo_run.output)


def test_running_again_runs_nothing_and_takes_less_than_twenty_seconds(demo_run):
    import time

    started = time.monotonic()
    again = run_command("run", "--profile", "demo", "--run-dir", demo_run.path)
    assert again.returncode == 0 and again.stdout.count("unchanged") == 6
    assert time.monotonic() - started < 20


def test_tracking_left_a_real_offline_run(demo_run):
    assert list((demo_run.path / "tracking" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_the_report_opens_without_a_network_and_shows_the_verdict(demo_run):
    pages = [*(demo_run.path / "report").glob("*.html"), demo_run.path / "comparison" / "answers.html"]
    assert len(pages) == 8
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?:src|<link[^>]*href)=[\"']?(?:https?:)?//", text), page.name
        assert "<script" not in text, page.name
        for target in re.findall(r'href="([^"#:]+)"', text):
            assert (page.parent / target).exists(), (page.name, target)
    assert "Verdict: better" in (demo_run.path / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_the_report_is_drawn_by_a_browser(demo_run, tmp_path):
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path}",
    ]
    picture = tmp_path / "report.png"
    page = (demo_run.path / "report" / "index.html").as_uri()
    command = ["chromium", *flags, "--window-size=1200,1600", f"--screenshot={picture}", page]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colours) > 500  # figures and text, not a blank or an error page


def test_each_figure_of_the_report_leads_to_its_file(demo_run):
    page = demo_run.path / "report" / "index.html"
    links = re.findall(r'<a href="(\.\./[^"]+\.png)"[^>]*><img', page.read_text(encoding="utf-8"))
    assert len(links) == 3 and all((page.parent / link).is_file() for link in links)


def test_score_recomputes_the_same_metrics_without_torch_and_shows_no_p_of_zero(copied_run):
    names = ("metrics.json", "table.csv", "answers.html", "comparison.png")
    before = {name: (copied_run / "comparison" / name).read_bytes() for name in names}
    shutil.rmtree(copied_run / "comparison")
    shutil.rmtree(copied_run / "export")
    code = (
        f"import sys; sys.argv = ['utils', 'score', {str(copied_run)!r}]\n"
        "from utils.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "from before" not in done.stdout
    assert re.search(r" < 0\.001$", done.stdout, re.MULTILINE) and not re.search(r" 0\.000$", done.stdout, re.MULTILINE)
    assert {name: (copied_run / "comparison" / name).read_bytes() for name in names} == before


def test_score_says_where_a_setting_was_changed_since(copied_run):
    settings = copied_run / "config.yaml"
    settings.write_text(settings.read_text(encoding="utf-8").replace("  r: 16\n", "  r: 3\n"), encoding="utf-8")
    done = run_command("score", copied_run)
    assert done.returncode == 0
    assert "03_lora_training is out of date: its settings changed (lora); the results here" in done.stdout


def test_score_takes_a_readers_ratings_and_later_scores_keep_them(copied_run, tmp_path):
    text = (copied_run / "comparison" / "rate.html").read_text(encoding="utf-8")
    (page,), pairs = re.findall('<body data-page="(.+)">', text), re.findall('data-pair="(.+?)"', text)
    ratings = {"page": page, "ratings": [{"pair": pair, "choice": "1"} for pair in pairs]}
    file = tmp_path / "ratings.json"
    file.write_text(json.dumps(ratings), encoding="utf-8")
    done = run_command("score", copied_run, "--ratings", file)
    assert done.returncode == 0 and "A reader, not told which was which" in done.stdout, done.stdout + done.stderr
    preference = copied_run / "comparison" / "preference.json"
    (claim,) = json.loads(preference.read_text(encoding="utf-8"))
    assert claim["claim"] == "preferred by a reader" and claim["verdict"] == "cannot tell"
    assert claim["n"] == len(pairs) == 32 and claim["share"] == 0.5  # always the first: each model's in half of them
    report = (copied_run / "report" / "index.html").read_text(encoding="utf-8")
    assert "Preferred by a reader?" in report and "../comparison/rate.html" in report
    assert open_run("auto", copied_run).out_of_date(STAGES[-1]) is None  # a rating spoils no export
    assert run_command("score", copied_run).returncode == 0 and json.loads(preference.read_text()) == [claim]


def test_adapter_and_merged_model_lie_apart_and_agree_token_for_token(demo_run):
    assert not (demo_run.path / "export" / "merged" / "adapter_config.json").exists()
    assert not (demo_run.path / "export" / "adapter" / "config.json").exists()
    agreement = json.loads((demo_run.path / "export" / "verify.json").read_text())["agreement"]
    for kind in ("adapter", "merged"):
        assert agreement[kind]["level"] == "exact"
        assert agreement[kind]["identical"] == agreement[kind]["prompts"] == 50
        assert agreement[kind]["largest_logit_difference"] < 1e-4


def test_a_null_run_cannot_tell_and_only_what_depends_on_the_change_runs_again(copied_run):
    done = run_command("run", "--run-dir", copied_run, "--set", "train.max_steps=0", "--to", "04")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("unchanged") == 3  # 00, 01 and 02 do not depend on the number of steps
    metrics = metrics_of(copied_run)
    assert metrics["verdict"] == "cannot tell" and metrics["primary"]["difference"] == 0


def test_the_demo_carries_the_claims_that_it_is_built_to_carry(demo_run):
    metrics = metrics_of(demo_run.path)
    assert {claim["claim"]: claim["verdict"] for claim in metrics["claims"]} == {
        "knows more": "better", "reasons shorter": "better", "keeps form": "cannot tell", "imitates the reference": "better",
    }  # fmt: skip
