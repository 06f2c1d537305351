"""Whatever a row, an answer, a name or a cell says is shown as text: looked at in a real browser."""

from __future__ import annotations

import nbformat
import pandas as pd
import pytest

EVIL = """</div></pre><script>window.ran = "script"</script><img src=x onerror="window.ran = 'image'"><svg onload="window.ran = 'svg'"></svg><iframe srcdoc="<script>parent.ran = 'frame'</script>"></iframe><a href="javascript:window.ran = 'link'">click</a>"""


def hostile_notebook() -> nbformat.NotebookNode:
    """An executed notebook whose cells show `EVIL` in every way in which a cell can show something."""
    new = nbformat.v4
    shown = ("text/html", "text/markdown", "text/latex", "application/javascript", "image/svg+xml", "text/plain")
    outputs = [new.new_output("display_data", data={kind: EVIL, "text/plain": EVIL}) for kind in shown]
    outputs += [
        new.new_output("stream", name="stdout", text=EVIL),
        new.new_output("error", ename="E", evalue=EVIL, traceback=[EVIL]),
        new.new_output("display_data", data={"text/html": "<table><thead><tr><th>head</th></tr></thead></table>"}),
    ]
    cell = new.new_code_cell("1")
    cell.outputs = outputs
    return new.new_notebook(cells=[new.new_markdown_cell(f"# Title\n\n{EVIL}"), cell])


@pytest.fixture(scope="module")
def hostile_pages(tmp_path_factory):
    """{name: page} of a run in whose name, settings, rows, answers, metrics and notebooks stands `EVIL`."""
    from tests.e2e.test_answers_page import evaluated, make_run
    from utils.files import write_json
    from utils.report.answers_page import write_answers_page, write_rating_page
    from utils.report.index import write_report

    run = make_run(tmp_path_factory.mktemp("<b>run") / "<script>window.ran = 1<!-- ")
    claim = {"claim": EVIL, "verdict": EVIL, "sentence": EVIL}
    primary = {"name": EVIL, "unit": EVIL, "base": 2.0, "tuned": 1.5, "difference": -0.5, "ci95": [-0.6, -0.4], "n": 9,
               "groups": 3, "test": EVIL}  # fmt: skip
    metrics = {"primary": primary, "verdict": EVIL, "sentence": EVIL, "claims": [claim], "registration": {}}
    write_json(run.file("comparison/metrics.json"), metrics)
    names = ("metric", "n", "base", "tuned", "difference", "ci_low", "ci_high", "p")
    table = pd.DataFrame([[EVIL, EVIL, 2, 1.5, -0.5, -0.6, -0.4, 0.01]], columns=names)
    table.to_csv(run.file("comparison/table.csv"), index=False)
    part = {"source": EVIL, "train_rows": EVIL, "eval_rows": 1, "rule": EVIL}
    write_json(run.file("data/split.json"), part)
    machine = {"where": EVIL, "gpus": [{"name": EVIL}], "processors": 2}
    write_json(run.file("environment.json"), {"machine": machine})
    write_json(run.file("export/verify.json"), {"agreement": {EVIL: {EVIL: EVIL}}})
    run.file("report/notebooks").mkdir(parents=True)
    nbformat.write(hostile_notebook(), run.file("report/notebooks") / "00_setup.ipynb")
    answers = write_answers_page(run, evaluated(0), evaluated(1))
    rating = write_rating_page(run, evaluated(0), evaluated(1))
    report = write_report(run)
    return {
        "answers.html": answers,
        "rate.html": rating,
        "report/index.html": report,
        "report/00_setup.html": report.with_name("00_setup.html"),
    }


@pytest.mark.parametrize("policy", [True, False], ids=["as written", "without its policy"])
@pytest.mark.parametrize("name", ["answers.html", "rate.html", "report/index.html", "report/00_setup.html"])
def test_markup_in_rows_answers_and_names_is_shown_as_text(name, policy, hostile_pages, driver, tmp_path, fault):
    """Twice: the browser's content policy alone would hide that something was not escaped."""
    text = hostile_pages[name].read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if "Content-Security-Policy" not in line]
    assert len(lines) == text.count("\n"), "one line is the policy"
    page = tmp_path / "page.html"
    page.write_text(text if policy else "\n".join(lines), encoding="utf-8")
    driver.get(page.as_uri())
    ran = driver.execute_script(
        "document.querySelectorAll('a').forEach(a => { if (a.protocol == 'javascript:') a.click() }); return window.ran"
    )
    found = driver.execute_script(
        "return [...document.querySelectorAll('script:not([nonce]), iframe, svg, object, embed, [onerror], [onload]')].map(e => e.outerHTML)"
    )
    found += driver.execute_script("return [...document.images].map(i => i.src).filter(s => !s.startsWith('data:'))")
    seen = driver.execute_script("return document.documentElement.textContent")
    fault("markup in rows, answers, names and outputs")
    assert ran is None and found == []
    assert "<script>" in seen
    if name == "report/00_setup.html":  # what is no harm is still there
        assert [e.text for e in driver.find_elements("css selector", "h1, thead th")] == ["Title", "head"]
