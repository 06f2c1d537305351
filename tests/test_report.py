"""Pages show what data and models say as text, whatever they say."""

from __future__ import annotations

import nbformat

from utils.report import executed_dir, write_report
from utils.rundir import open_run


def make_run(tmp_path):
    run = open_run("demo", tmp_path / "run")
    run.save()
    return run


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
