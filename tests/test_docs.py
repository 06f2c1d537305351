"""README and docs/: short, their tables current, and everything that they name there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import typer

from benchmarks.tables import BLOCK, TABLES, TARGET, evidence, rewrite
from utils.__main__ import app
from utils.project import PROFILES, ROOT
from utils.schema import Config, Section

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# `](docs/exports.md#gguf)`, or src="benchmarks/results/train.png"
LINK = re.compile(r"(?:\]\(|src=\")(?!https?:)(?P<path>[^)#\s\"]*)(?:#(?P<heading>[\w-]+))?[)\"]")
MAKE = re.compile(r"(?:`|^)make (?P<target>[a-z][a-z-]*)", re.MULTILINE)  # `make demo`, or a line of a block
COMMAND = re.compile(r"python3? -m utils (?P<command>[a-z]+)(?P<rest>[^\n`]*)")  # python -m utils push --wait
MODULE = re.compile(r"python3? -m (?P<module>(?:utils|benchmarks|tests)(?:\.\w+)+)")  # python -m benchmarks.split
SETTING = re.compile(
    r"(?:`|--set )(?P<section>[a-z]+)\.(?P<key>[a-z_.]+)(?=[`=])"
)  # `train.optim`, --set train.optim=sgd


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def page(request) -> Path:
    return request.param


def test_the_readme_has_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_table_is_current_and_every_page_has_its_marks(page):
    text = page.read_text(encoding="utf-8")
    assert rewrite(text) == text, "run make tables"
    assert len(BLOCK.findall(text)) == text.count("<!-- table:") == text.count("<!-- end -->")


def test_every_table_has_a_place_in_docs():
    placed = [block["name"] for path in PAGES for block in BLOCK.finditer(path.read_text(encoding="utf-8"))]
    assert sorted(placed) == sorted(TABLES)


def test_a_changed_figure_changes_its_table(monkeypatch):
    found = evidence("split") | {"seconds": 999.9}
    monkeypatch.setattr("benchmarks.tables.evidence", lambda name: found)
    before = "# Page\n\n<!-- table: split -->\nold\n<!-- end -->\nafter\n"
    after = rewrite(before)
    assert "999.9 s" in after and "old" not in after and after.endswith("<!-- end -->\nafter\n")


def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        target = page.parent / link["path"] if link["path"] else page
        assert target.exists(), link[0]
        if link["heading"]:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert link["heading"] in anchors, link[0]


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = {link["path"] for link in LINK.finditer(README.read_text(encoding="utf-8"))}
    assert {f"docs/{path.name}" for path in PAGES[1:]} <= linked


def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {found["target"] for found in MAKE.finditer(page.read_text(encoding="utf-8"))} <= targets


def test_every_target_that_explains_itself_is_in_the_table():
    explained = TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert len(explained) >= 8 and all(
        f"| `make {name}` | {what} |" in TABLES["make-targets"]() for name, what in explained
    )


def test_every_command_and_option_of_the_command_line_exists(page):
    commands = typer.main.get_command(app).commands
    for found in COMMAND.finditer(page.read_text(encoding="utf-8")):
        assert found["command"] in commands, found[0]
        options = {
            name for option in commands[found["command"]].params for name in (*option.opts, *option.secondary_opts)
        }
        given = set(re.findall(r"(?<=\s)--[a-z-]+", found["rest"].split("#")[0]))
        assert given <= options | {"--help"}, found[0]


def test_every_module_that_is_run_exists(page):
    for found in MODULE.finditer(page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(found["module"]) is not None, found[0]


def test_every_setting_exists(page):
    for found in SETTING.finditer(page.read_text(encoding="utf-8")):
        if found["section"] not in Config.model_fields:
            continue  # a file of that name, such as data/split.json
        section = Config
        for part in (found["section"], *found["key"].split(".")):
            assert part in section.model_fields, found[0]
            kind = section.model_fields[part].annotation
            section = kind if isinstance(kind, type) and issubclass(kind, Section) else Section


def test_the_readme_names_every_profile():
    named = set(re.findall(r"^\| `([\w-]+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert {path.stem for path in PROFILES.glob("*.yaml")} <= named


def test_every_path_of_the_code_that_development_names_exists():
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:utils|tests|benchmarks|notebooks|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_every_message_in_troubleshooting_stands_in_the_code():
    files = [*(ROOT / "utils").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a sentence may go on in the next line
    for path in (README, ROOT / "docs" / "troubleshooting.md"):
        text = path.read_text(encoding="utf-8").partition("# Troubleshooting")[2]
        for message in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE):
            assert all(part.strip() in code for part in message.split("…")), message
