"""Pages show what data and models say as text, whatever they say."""

from __future__ import annotations

import nbformat
import pytest

from utils.files import write_json
from utils.pipeline.run_dir import open_run
from utils.report.index import write_report


def make_run(tmp_path):
    run = open_run("demo", tmp_path / "run")
    run.save()
    return run


def test_a_report_of_an_unfinished_run_shows_what_there_is(tmp_path):
    run = make_run(tmp_path)
    page = write_report(run).read_text(encoding="utf-8")
    assert "demo" in page and "Verdict" not in page


def test_a_report_names_the_settings_that_are_not_the_profiles(tmp_path):
    page = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    assert "Settings other than" not in page
    run = open_run("demo", tmp_path / "control", {"data.shuffle_answers": True})
    run.save()
    page = write_report(run).read_text(encoding="utf-8")
    assert "Settings other than the profile's: <code>data.shuffle_answers=True</code>" in page


def metrics_file(left_out: int | None) -> dict:
    """What the template reads of comparison/metrics.json; None: written before the count was kept."""
    primary = {
        "name": "nll", "unit": "nats per token", "base": 2.0, "tuned": 1.5, "difference": -0.5, "ci95": [-0.6, -0.4], "n": 9,
        "groups": 9, "test": "sign flips",
    }  # fmt: skip
    metrics = {"primary": primary, "verdict": "better", "sentence": "So.", "claims": [], "registration": {}}
    return metrics if left_out is None else {**metrics, "nll_rows_left_out": left_out}


@pytest.mark.parametrize(
    ("left_out", "told"), [(None, None), (0, None), (1, "1 held-out row is longer"), (3, "3 held-out rows are longer")]
)
def test_rows_that_were_too_long_for_the_loss_are_told_where_there_are_any(tmp_path, left_out, told):
    run = make_run(tmp_path)
    write_json(run.file("comparison/metrics.json"), metrics_file(left_out))
    names = ("metric", "n", "base", "tuned", "difference", "ci_low", "ci_high", "p")
    run.file("comparison/table.csv").write_text(f"{','.join(names)}\nheld-out loss,9,2,1.5,-0.5,-0.6,-0.4,0.01\n")
    page = write_report(run).read_text(encoding="utf-8")
    assert "imitation of the reference" in page
    assert ("max_seq_length" in page) is (told is not None) and (told or "") in page


def test_an_executed_notebook_shows_the_last_state_of_a_progress_bar_and_no_badge(tmp_path):
    run = make_run(tmp_path)
    cell = nbformat.v4.new_code_cell("1")
    for text in ("\r 0%", "\r 50%", "\r 100%\n"):
        cell.outputs.append(nbformat.v4.new_output("stream", name="stdout", text=text))
    title = nbformat.v4.new_markdown_cell(
        "# T\n\n[![Open in Colab](https://x/badge.svg)](https://x)\n\n[next](01_b.ipynb)"
    )
    run.file("report/notebooks").mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[title, cell]), run.file("report/notebooks") / "00_setup.ipynb")
    write_report(run)
    page = run.file("report/00_setup.html").read_text(encoding="utf-8")
    assert "100%" in page and "50%" not in page
    assert "badge" not in page and 'href="01_b.html"' in page


def test_the_report_needs_no_template_of_nbconvert(tmp_path, monkeypatch):
    """They lie on a data path of the installation; where it was not found, a run whose stages passed ended in a traceback."""
    from nbconvert.exporters.templateexporter import TemplateExporter

    def not_found(_):
        raise ValueError("No template sub-directory with name 'basic' found")

    monkeypatch.setattr(TemplateExporter, "get_template_names", not_found)
    run = make_run(tmp_path)
    cell = nbformat.v4.new_code_cell("x = 1")
    cell.outputs.append(
        nbformat.v4.new_output("execute_result", {"text/plain": "one <b>", "image/png": "iVBORw0KGgo="})
    )
    run.file("report/notebooks").mkdir(parents=True)
    cells = [nbformat.v4.new_markdown_cell("## Two"), cell]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), run.file("report/notebooks") / "00_setup.ipynb")
    write_report(run)
    page = run.file("report/00_setup.html").read_text(encoding="utf-8")
    assert "<h2" in page and 'src="data:image/png;base64,iVBORw0KGgo="' in page and "one <b>" not in page


def test_every_kind_of_output_is_shown_and_none_of_it_runs(tmp_path):
    run = make_run(tmp_path)
    cell = nbformat.v4.new_code_cell("show()")
    for data in ({"text/html": "<table><tr><td>7</td></tr></table><script>alert(1)</script>", "text/plain": "no"},
                 {"text/markdown": "**bold** <script>alert(2)</script>"}, {"text/plain": "a < b"},
                 {"application/javascript": "alert(3)"}):  # fmt: skip
        cell.outputs.append(nbformat.v4.new_output("display_data", data))
    cell.outputs.append(nbformat.v4.new_output("error", ename="E", evalue="v", traceback=["\x1b[31mE\x1b[0m: <v>"]))
    run.file("report/notebooks").mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), run.file("report/notebooks") / "00_setup.ipynb")
    write_report(run)
    page = run.file("report/00_setup.html").read_text(encoding="utf-8")
    assert "<td>7</td>" in page and "<strong>bold</strong>" in page and "a &lt; b" in page and "&lt;v&gt;" in page
    assert "<script" not in page and "alert(3)" not in page and ">no<" not in page
