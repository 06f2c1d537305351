"""report/index.html: the verdict, the figures and the executed notebooks, in files that open without a network."""

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import nbformat
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.console import Console

from utils.config import differing_settings
from utils.errors import RunDirError
from utils.files import write_text
from utils.pipeline.console import read_sentence, summarise
from utils.pipeline.run_dir import RunDir, require_recorded
from utils.pipeline.stages import BY_NAME, STAGES, Stage
from utils.project import command

_FIGURES = {
    "comparison/comparison.png": "Both models on the same held-out questions",
    "training/loss.png": "The training run",
    "data/lengths.png": "What the model was trained on",
}
_PANDAS_STYLE = re.compile(r"<style scoped>.*?</style>", re.DOTALL)  # the page has its own
_BADGE = re.compile(r"^.*\[!\[Open in.*", re.MULTILINE)
_TAGS = frozenset(
    "a abbr b blockquote br code dd details div dl dt em h1 h2 h3 h4 h5 h6 hr i li ol p pre s small span strong sub "
    "summary sup table tbody td th thead tr u ul wbr".split()
)
_SPANS = ["colspan", "rowspan"]
_ATTRIBUTES = {"*": ["class", "dir", "id", "style", "title"], "a": ["href"], "td": _SPANS, "th": _SPANS}


def conclude(run: RunDir, worked: bool, console: Console, seconds: float) -> None:
    """Write the report and say what came of the run; stages that passed have passed, whatever becomes of the report."""
    sentence, stale = "", None
    try:
        if worked or not run.file("report/index.html").exists():
            write_report(run)
        if run.file("comparison/metrics.json").exists():
            sentence, stale = read_sentence(run.path), run.out_of_date(BY_NAME["04_comparison"])
    except Exception as error:
        again = f"{command('run', '--run-dir', run.path)} tries again once report/index.html is removed"
        console.print(f"The report could not be written ({type(error).__name__}: {error}); {again}.", style="yellow")
    summarise(run, console, seconds, sentence, stale)


def write_report(run: RunDir) -> Path:
    """Render the report from what the run directory holds; stages that have not run are left out."""
    templates = Environment(loader=PackageLoader("utils.report", "templates"), autoescape=True)
    # Cells are rendered here: nbconvert's exporters need templates from a data path, which not every image has.
    templates.filters |= _filters()
    metrics = _read_json(run, "comparison/metrics.json")
    page = templates.get_template("report.html.j2").render(
        run=run,
        settings=differing_settings(run.config),
        metrics=metrics,
        preference=_read_json(run, "comparison/preference.json") or [],
        stale=run.out_of_date(BY_NAME["04_comparison"]) if metrics else None,
        table=list(csv.DictReader(io.StringIO(_read(run, "comparison/table.csv").decode()))),
        split=_read_json(run, "data/split.json"),
        environment=_read_json(run, "environment.json"),
        verify=_read_json(run, "export/verify.json"),
        figures=[
            (title, f"data:image/png;base64,{base64.b64encode(picture).decode()}", f"../{name}")
            for name, title in _FIGURES.items()
            if (picture := _read(run, name))
        ],
        pages={name for name in ("answers", "rate") if run.file(f"comparison/{name}.html").exists()},
        chapters=_write_chapters(run, templates),
    )
    return write_text(run.file("report/index.html"), page)


def _write_chapters(run: RunDir, templates: Environment) -> list[tuple[Stage, dict]]:
    """A page for each executed notebook, without badges, which are pictures from a network, with links to the report's own
    pages, and with the last state of each progress bar only; returns (stage, its record)."""
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    chapters = []
    for stage in STAGES:
        source, record = run.file(f"report/notebooks/{stage.name}.ipynb"), run.record(stage)
        finished = record.get("finished")
        # A notebook run by hand leaves no executed copy here: an older one would show another run.
        if not source.exists() or (finished and source.stat().st_mtime < datetime.fromisoformat(finished).timestamp()):
            run.file(f"report/{stage.name}.html").unlink(missing_ok=True)
            continue
        try:
            notebook, _ = CoalesceStreamsPreprocessor().preprocess(nbformat.read(source, as_version=4), {})
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = _BADGE.sub("", cell.source).replace(".ipynb)", ".html)")
            page = templates.get_template("notebook.html.j2").render(
                title=f"{stage.number} {stage.title}", cells=notebook.cells, profile=run.config.profile
            )
        except Exception as error:
            # Damaged: nbformat has many types for it, and the results stand without it.
            print(f"{source} cannot be read ({type(error).__name__}) and is left out of the report.")
            continue
        write_text(run.file(f"report/{stage.name}.html"), page)
        chapters.append((stage, record))
    return chapters


def _filters() -> dict[str, Callable[[str], Markup]]:
    """How the template shows a cell's parts: cleaned HTML, Markdown, code, and text with a terminal's colours."""
    import bleach
    from bleach.css_sanitizer import CSSSanitizer
    from nbconvert.filters import Highlight2HTML, ansi2html, markdown2html

    def clean(html: str) -> Markup:  # unknown tags become text
        kept = _PANDAS_STYLE.sub("", str(html))
        safe = bleach.clean(kept, _TAGS, _ATTRIBUTES, css_sanitizer=CSSSanitizer(), strip_comments=True)
        return Markup(safe)  # noqa: S704 - cleaned of whatever runs

    return {
        "clean": clean,
        "markdown": lambda text: clean(markdown2html(text)),
        "code": lambda text: Markup(Highlight2HTML("python")(text)),  # noqa: S704 - pygments escapes
        "ansi": lambda text: Markup(ansi2html(text)),  # noqa: S704 - nbconvert escapes
    }


def _read(run: RunDir, name: str) -> bytes:
    """A file's content; nothing where it is missing, or not as its stage wrote it."""
    try:
        require_recorded(run.path, (name,))
        return run.file(name).read_bytes()
    except (RunDirError, FileNotFoundError):
        return b""


def _read_json(run: RunDir, name: str) -> dict:
    return json.loads(_read(run, name) or b"{}")
