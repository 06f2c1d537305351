"""The page of answers: what it shows and in which order, and how it behaves in a real browser."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from utils.evaluation.evaluate import Evaluation
from utils.pipeline.run_dir import open_run
from utils.report.answers_page import write_answers_page

EVIL = "</div></details><script>alert('x')</script><img src=x onerror=alert(1)> & <b>bold</b>"
NAN = float("nan")
# id: (base right, fine-tuned right, what is asked)
OPEN = {
    "right-both": (
        1.0,
        1.0,
        "What is it? \U0001fa7a\U0001f9d1\u200d⚕️ 一位六十岁的妇女长期不自主漏尿，应考虑什么诊断？" + "很长" * 200,
    ),
    "fixed": (0.0, 1.0, "מהו האבחון הסביר ביותר? (stress incontinence)\nما هو التشخيص الأرجح؟"),
    "wrong-both": (0.0, 0.0, EVIL),
    "nobody-knows": (NAN, NAN, "x" * 5000),
    "broken": (1.0, 0.0, "Which test comes next?"),
}
CHOICE = {"item 7/b": (1.0, 0.0, "Which letter?"), "item-8": (0.0, 0.0, "Which other letter?")}
FORCED = {"baseline": "B", "tuned": "<i>C</i>"}  # what was read from the logits for `item-8`
LONG = "no space at all " * 100 + "W" * 98_400


def completion(identifier: str, name: str) -> str:
    answer = {"wrong-both": EVIL, "nobody-knows": LONG, "fixed": "דליפת שתן במאמץ \U0001f468‍⚕️"}.get(
        identifier, f"the {name} answer"
    )
    return f"thinking of {identifier} {EVIL}\n</think>\n{answer}"


def scored(which: int) -> pd.DataFrame:
    """A frame like metrics.score_answers makes it; `item-8` was cut off by the token cap of both models."""
    rows = []
    for kind, questions in (("open", OPEN), ("choice", CHOICE)):
        for identifier, outcome in questions.items():
            cut = identifier == "item-8"
            rows.append(
                {
                    "id": identifier, "kind": kind, "group": identifier, "correct": outcome[which],
                    "parsed": NAN if outcome[which] != outcome[which] else float(not cut), "well_formed": float(not cut),
                    "stopped": float(not cut), "tokens": 40, "reasoning_tokens": 12,
                    "letter": ("B" if which else "C") if kind == "choice" and not cut else None,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def make_run(folder, anecdote: bool = True):
    """A run directory with every outcome, hostile and long texts, and two multiple-choice items."""
    run = open_run("demo", folder / "run")
    run.save()
    rows = [
        {"id": i, "Question": asked, "Complex_CoT": "why", "Response": f"ref {i}"} for i, (*_, asked) in OPEN.items()
    ]
    items = [
        {"id": i, "question": q, "options": {"B": "a beta", "C": "a gamma"}, "gold": "C"}
        for i, (*_, q) in CHOICE.items()
    ]
    run.file("data").mkdir()
    pd.DataFrame(rows).to_parquet(run.file("data/eval.parquet"))
    run.file("data/benchmark.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    row = {"id": "a1", "Question": "A 61-year-old woman?", "Complex_CoT": "hm", "Response": "the reference says"}
    run.file("data/anecdote.json").write_text(json.dumps(row if anecdote else {}))
    return run


def evaluated(which: int, anecdote: bool = True) -> Evaluation:
    """What one model said, the tutorials' question included where the run has it."""
    name = ("baseline", "tuned")[which]
    answers = {i: {"text": completion(i, name)} for i in OPEN}
    answers |= {i: {"text": f"hm\n</think>\n{name}: The answer is C."} for i in CHOICE}
    cut_off = next(reversed(answers))
    answers[cut_off] = {"text": "thinking without an end"}
    if anecdote:
        answers["anecdote"] = {"text": f"</think>the {name} says", "reasoning_tokens": 3, "finish_reason": "length"}
    return Evaluation(answers, {cut_off: FORCED[name]}, scored(which), pd.DataFrame())


def make_page(folder, **changes):
    run = make_run(folder, **changes)
    return write_answers_page(run, evaluated(0, **changes), evaluated(1, **changes))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return make_page(tmp_path_factory.mktemp("page"))


@pytest.fixture
def phone(driver, page):
    """The page on a screen of 390 by 844 pixels (a window cannot be made that narrow: the device is emulated)."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.as_uri())
    yield driver
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def desktop(driver, page):
    driver.set_window_size(1200, 900)
    driver.get(page.as_uri())
    return driver


def shown(driver) -> list[str]:
    """The ids of the questions on display, from top to bottom."""
    script = "return [...document.querySelectorAll('.questions > article')].filter(a => a.getClientRects().length).map(a => a.id)"
    return driver.execute_script(script)


def test_what_fine_tuning_broke_comes_first_and_what_nobody_can_check_last(desktop):
    order = ["q-broken", "q-item%207/b", "q-wrong-both", "q-item-8", "q-fixed", "q-right-both", "q-nobody-knows"]
    assert shown(desktop) == order


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("all", 7),
        ("broken", ["q-broken", "q-item%207/b"]),
        ("both-wrong", ["q-wrong-both", "q-item-8"]),
        ("fixed", ["q-fixed"]),
        ("both-right", ["q-right-both"]),
        ("not-checkable", ["q-nobody-knows"]),
    ],
)
def test_the_filter_shows_exactly_the_chosen_outcome_and_its_count(phone, outcome, expected):
    label = phone.find_element("css selector", f"label[for=show-{outcome}]")
    label.click()
    count = int(label.find_element("tag name", "b").text)
    assert len(shown(phone)) == count
    assert expected in (count, shown(phone))


def test_the_filter_is_used_by_keyboard_alone(desktop):
    from selenium.webdriver.common.keys import Keys

    desktop.find_element("id", "show-all").send_keys(Keys.ARROW_RIGHT)
    assert shown(desktop) == ["q-broken", "q-item%207/b"]
    focused = desktop.switch_to.active_element
    assert focused.get_attribute("id") == "show-broken"
    outline = "return getComputedStyle(arguments[0].nextElementSibling).outlineStyle"
    assert desktop.execute_script(outline, focused) == "solid"


def test_a_think_block_is_folded_and_opens_on_a_click(desktop):
    details = desktop.find_element("css selector", "#q-broken .reply:nth-of-type(2) details")
    words = details.find_element("class name", "text")
    assert not words.is_displayed()
    details.find_element("tag name", "summary").click()
    assert words.is_displayed() and words.text.startswith("thinking of broken")


def test_nothing_scrolls_sideways_on_a_phone(phone):
    phone.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert phone.execute_script("return window.innerWidth") == 390
    assert phone.execute_script("return document.documentElement.scrollWidth") <= 390
    wide = "return [...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).length"
    assert phone.execute_script(wide) == 0


def test_an_answer_of_100_000_characters_stays_in_a_box_of_its_own(phone):
    box = phone.find_element("css selector", "#q-nobody-knows .reply:last-child > .text")
    assert len(box.get_attribute("textContent").strip()) == 100_000
    assert box.size["height"] < 844 and box.get_attribute("tabindex") == "0"


def test_what_is_tapped_is_large_enough_for_a_thumb(phone):
    targets = phone.find_elements("css selector", ".filter > label, summary, .anchor, .back, .up")
    assert targets and all(target.size["height"] >= 44 for target in targets)


def test_right_to_left_text_runs_from_right_to_left(desktop):
    direction = "return getComputedStyle(document.querySelector('#q-fixed > .text')).direction"
    assert desktop.execute_script(direction) == "rtl"


def test_a_hostile_completion_stays_text(desktop):
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        _ = desktop.switch_to.alert.text
    assert desktop.execute_script("return document.querySelectorAll('script, img, [onerror]').length") == 0
    answer = desktop.find_element("css selector", "#q-wrong-both .reply:last-child > .text")
    assert answer.text == EVIL


def test_nothing_is_requested_beside_the_page_itself(desktop):
    assert desktop.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_each_question_can_be_linked_to(desktop, page):
    links = desktop.find_elements("css selector", ".anchor")
    assert len(links) == 7
    for link in links:
        desktop.get(link.get_attribute("href"))
        target = desktop.find_element("css selector", ":target")
        assert target.find_element("class name", "anchor").get_attribute("href") == link.get_attribute("href")


def test_multiple_choice_shows_options_the_right_letter_and_the_letter_that_was_read(desktop):
    article = desktop.find_element("id", "q-item%207/b")
    assert article.find_element("class name", "gold").text == "C a gamma"
    assert "reference: C a gamma" in article.text
    base, tuned = (reply.find_element("tag name", "h3").text for reply in article.find_elements("class name", "reply"))
    assert base.split("\n") == ["base", "read: C", "right"] and tuned.split("\n") == ["fine-tuned", "read: B", "wrong"]
    assert "cut off" in desktop.find_element("id", "q-item-8").text
    assert "no explicit answer" in desktop.find_element("id", "q-item-8").text


def test_the_tutorials_question_comes_first_and_is_not_counted(desktop):
    box = desktop.find_element("css selector", "main > article")
    assert "The tutorials' question (never scored)" in box.text and "the reference says" in box.text
    assert "the baseline says" in box.text and "the tuned says" in box.text and "cut off" in box.text
    assert "right" not in box.text and "wrong" not in box.text


def test_a_run_that_did_not_ask_the_tutorials_question_has_no_box_for_it(tmp_path):
    assert "never scored" not in make_page(tmp_path, anecdote=False).read_text(encoding="utf-8")


def test_a_run_without_generated_answers_says_so(tmp_path):
    run = make_run(tmp_path, anecdote=False)
    empty = scored(0).head(0)
    silent = Evaluation({}, {}, empty, empty)
    text = write_answers_page(run, silent, silent).read_text(encoding="utf-8")
    assert "No held-out question was answered" in text and "<article" not in text


def test_a_reply_that_was_cut_off_shows_its_forced_letter_and_no_other_reply_has_one(page):
    """In the page's source, so that it is looked at without a browser too."""
    text = page.read_text(encoding="utf-8")
    start = text.index('id="q-item-8"')
    base, tuned = text[start : text.index("</article>", start)].split('<section class="reply">')[1:]
    assert ">forced: B</span>" in base and ">forced: &lt;i&gt;C&lt;/i&gt;</span>" in tuned
    assert text.count("forced: ") == 2 and "<i>" not in text


def test_reasoning_that_never_ended_is_all_that_was_said_and_is_not_folded(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<details open>") == text.count("tokens, never ended") == 2  # both models' cut-off reply
