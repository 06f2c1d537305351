"""comparison/rate.html: pairs of answers without their models' names, which a reader rates by keyboard."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader

from utils.evaluation.answer_parsing import parse_completion
from utils.evaluation.evaluate import Evaluation
from utils.evaluation.rating import digest_pairs, draw_pairs
from utils.files import write_text
from utils.pipeline.run_dir import RunDir
from utils.report.answers_page import describe_questions


def write_rating_page(run: RunDir, base: Evaluation, tuned: Evaluation) -> Path:
    """Render comparison/rate.html, one file that works offline; `python -m utils score --ratings` takes what it saves."""
    pairs, about = draw_pairs(run, base, tuned), describe_questions(run)
    items = [
        {
            "id": pair.id,
            "question": about[pair.id]["question"],
            "options": about[pair.id].get("options"),
            "completions": [parse_completion(text) for text in pair.texts],
        }
        for pair in pairs
    ]
    page = digest_pairs(pairs)
    templates = Environment(loader=PackageLoader("utils.report", "templates"), autoescape=True)
    # The nonce lets the page's own script run and no other: no answer can know a digest of itself.
    text = templates.get_template("rate.html.j2").render(items=items, page=page, nonce=page)
    write_text(run.file("comparison/rate.html"), text)
    return run.file("comparison/rate.html")
