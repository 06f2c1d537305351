"""report/index.html: the verdict, the figures and the executed notebooks, in files that open without a network."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import nbformat
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from utils.errors import RunDirError
from utils.files import write_text
from utils.pipeline.run_dir import RunDir, require_recorded
from utils.pipeline.stages import BY_NAME, STAGES, ancestors

_FIGURES = (
    ("comparison/comparison.png", "Both models on the same held-out questions"),
    ("training/loss.png", "The training run"),
    ("data/lengths.png", "What the model was trained on"),
)
_PANDAS_STYLE = re.compile(r"<style scoped>.*?</style>", re.DOTALL)  # the page has its own
_TAGS = frozenset(
    "a abbr b blockquote br code dd details div dl dt em h1 h2 h3 h4 h5 h6 hr i li ol p pre s small span strong sub "
    "summary sup table tbody td th thead tr u ul wbr".split()
)
_ATTRIBUTES = {
    "*": ["class", "dir", "id", "style", "title"],
    "a": ["href"],
    "td": ["colspan", "rowspan"],
    "th": ["colspan", "rowspan"],
}


def executed_dir(run: RunDir) -> Path:
    """Where the driver keeps the executed notebooks."""
    return run.file("report/notebooks")


def write_report(run: RunDir) -> Path:
    """Render the report from what the run directory holds; stages that have not run are left out."""
    templates = Environment(loader=PackageLoader("utils.report", "templates"), autoescape=True)
    # Cells are rendered here: nbconvert's exporters need templates from a data path, which not every image has.
    templates.filters |= _filters()
    chapters = _write_chapters(run, templates)
    metrics = _read_json(run, "comparison/metrics.json")
    table = run.file("comparison/table.csv")
    page = templates.get_template("report.html.j2").render(
        run=run,
        metrics=metrics,
        stale=stale_comparison(run) if metrics else None,
        table=list(csv.DictReader(table.open(encoding="utf-8"))) if _is_here(run, "comparison/table.csv") else [],
        split=_read_json(run, "data/split.json"),
        environment=_read_json(run, "environment.json"),
        verify=_read_json(run, "export/verify.json"),
        figures=[(title, _data_uri(run.file(name)), f"../{name}") for name, title in _FIGURES if _is_here(run, name)],
        answers="../comparison/answers.html" if run.file("comparison/answers.html").exists() else None,
        chapters=chapters,
    )
    write_text(run.file("report/index.html"), page)
    return run.file("report/index.html")


def stale_comparison(run: RunDir) -> str | None:
    """Why the comparison on file is not that of the settings in force, in words; None where it is."""
    comparison = BY_NAME["04_comparison"]
    found = run.first_stale((*ancestors(comparison), comparison))
    return f"{found[0].name} changed: {found[1]}" if found else None


def _write_chapters(run: RunDir, templates: Environment) -> list[dict]:
    """A page for each executed notebook; returns number, title, href, seconds and peak memory of each."""
    chapters = []
    for stage in STAGES:
        source, record = executed_dir(run) / f"{stage.name}.ipynb", run.record(stage)
        finished = record.get("finished")
        # A notebook run by hand leaves no executed copy here: an older one would show another run.
        if not source.exists() or (finished and source.stat().st_mtime < datetime.fromisoformat(finished).timestamp()):
            continue
        try:
            page = templates.get_template("notebook.html.j2").render(
                title=f"{stage.number} {stage.title}",
                cells=_for_report(nbformat.read(source, as_version=4)).cells,
                profile=run.config.profile,
            )
        except Exception as error:
            # Damaged: nbformat has many types for it, and the results stand without it.
            print(f"{source} cannot be read ({type(error).__name__}) and is left out of the report.")
            continue
        write_text(run.file(f"report/{stage.name}.html"), page)
        peak = record.get("peak_memory", {})
        gpu = f", {peak['gpu_reserved_gib']} GiB GPU" if "gpu_reserved_gib" in peak else ""
        about = {"number": stage.number, "title": stage.title, "href": f"{stage.name}.html"}
        chapters.append(about | {"seconds": record.get("seconds", 0.0), "peak": f"{peak.get('rss_gib', 0)} GiB{gpu}"})
    return chapters


def _filters() -> dict[str, Callable[[str], Markup]]:
    """How the template shows a cell's parts: cleaned HTML, Markdown, code, and text with a terminal's colours."""
    from nbconvert.filters import ansi2html, markdown2html
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return {
        "clean": lambda text: Markup(clean_html(text)),  # noqa: S704 - cleaned of whatever runs
        "markdown": lambda text: Markup(clean_html(markdown2html(text))),  # noqa: S704
        "code": lambda text: Markup(highlight(text, PythonLexer(), HtmlFormatter())),  # noqa: S704 - pygments escapes
        "ansi": lambda text: Markup(ansi2html(text)),  # noqa: S704 - nbconvert escapes
    }


def clean_html(element: str | bytes) -> str:
    """What a cell shows as HTML or Markdown, without anything that runs: unknown tags become text."""
    import bleach
    from bleach.css_sanitizer import CSSSanitizer

    text = element.decode() if isinstance(element, bytes) else str(element)
    text = _PANDAS_STYLE.sub("", text)
    return bleach.clean(text, _TAGS, _ATTRIBUTES, css_sanitizer=CSSSanitizer(), strip_comments=True)


def _for_report(notebook):
    """The notebook without badges, which are pictures from a network, with links to the report's own pages, and with
    the last state of each progress bar only."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            lines = [line for line in cell.source.split("\n") if not line.startswith("[![Open in")]
            cell.source = "\n".join(lines).replace(".ipynb)", ".html)")
        outputs: list = []
        for output in cell.get("outputs", []):
            if outputs and output.output_type == "stream" and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        for output in outputs:
            if output.output_type == "stream":
                output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
        if cell.cell_type == "code":
            cell.outputs = outputs
    return notebook


def _is_here(run: RunDir, name: str) -> bool:
    """Whether the file is there as its stage wrote it: what was damaged since is left out of the page."""
    try:
        require_recorded(run.path, (name,))
    except RunDirError:
        return False
    return run.file(name).exists()


def _read_json(run: RunDir, name: str) -> dict:
    return json.loads(run.file(name).read_text(encoding="utf-8")) if _is_here(run, name) else {}


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
