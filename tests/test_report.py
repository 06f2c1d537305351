"""Pages show what data and models say as text, whatever they say."""

from __future__ import annotations

import json

import nbformat
import pandas as pd

from utils.comparison import Arms
from utils.report import executed_dir, write_answers, write_report
from utils.rundir import open_run

EVIL = "<script>alert('x')</script> & <b>bold</b>"


def make_run(tmp_path):
    run = open_run("demo", tmp_path / "run")
    run.save()
    return run


def test_markup_in_rows_and_answers_is_shown_as_text(tmp_path):
    run = make_run(tmp_path)
    rows = pd.DataFrame([{"id": "a", "Question": EVIL, "Complex_CoT": "c", "Response": EVIL}])
    run.file("data").mkdir()
    rows.to_parquet(run.file("data/eval.parquet"))
    for arm in ("baseline", "tuned"):
        run.file(arm).mkdir()
        answer = {"id": "a", "text": f"{EVIL}\n</think>\n{EVIL}"}
        run.file(f"{arm}/answers.jsonl").write_text(json.dumps(answer) + "\n")
    scored = pd.DataFrame([{"id": "a", "kind": "open", "correct": 0.0, "reasoning_tokens": 3}])
    page = write_answers(run, Arms(scored, scored, rows, rows, {})).read_text(encoding="utf-8")
    assert "<script" not in page and "<b>bold" not in page
    assert page.count("&lt;script&gt;") == 6  # question, reference, two reasonings, two answers


def test_a_report_of_an_unfinished_run_shows_what_there_is(tmp_path):
    run = make_run(tmp_path)
    page = write_report(run).read_text(encoding="utf-8")
    assert "demo" in page and "Verdict" not in page


def test_an_executed_notebook_shows_the_last_state_of_a_progress_bar_and_no_badge(tmp_path):
    run = make_run(tmp_path)
    cell = nbformat.v4.new_code_cell("1")
    for text in ("\r 0%", "\r 50%", "\r 100%\n"):
        cell.outputs.append(nbformat.v4.new_output("stream", name="stdout", text=text))
    title = nbformat.v4.new_markdown_cell(
        "# T\n\n[![Open in Colab](https://x/badge.svg)](https://x)\n\n[next](01_b.ipynb)"
    )
    executed_dir(run).mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[title, cell]), executed_dir(run) / "00_setup.ipynb")
    write_report(run)
    page = run.file("report/00_setup.html").read_text(encoding="utf-8")
    assert "100%" in page and "50%" not in page
    assert "badge" not in page and 'href="01_b.html"' in page
