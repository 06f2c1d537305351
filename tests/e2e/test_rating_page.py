"""The rating page in a real browser: rated by keyboard, reloaded, saved, scored; and it does not tell whose answer is whose."""

from __future__ import annotations

import json
import time
from collections import Counter

import pandas as pd
import pytest
from scipy.stats import binomtest

from utils.evaluation.evaluate import Evaluation
from utils.evaluation.rating import Pair, digest_pairs, draw_pairs, keep_ratings, state_preference
from utils.pipeline.run_dir import open_run
from utils.report.answers_page import write_rating_page

EVIL = (
    "</div></section><script>window.ran = 'script'</script><img src=x onerror=\"window.ran = 'image'\"> & <b>bold</b>"
)
NAMES = ["constructor", "0", 'quoted " name', *(f"row {i}" for i in range(47))]
KEYS = {"equal": "=", "both bad": "0"}


def make(folder):
    """(run, base, fine-tuned): fifty open questions; no text says whose it is, some hold markup, one never ends."""
    run = open_run("demo", folder / "run")
    run.save()
    rows = [{"id": n, "Question": f"What of {n}?", "Complex_CoT": "why", "Response": "so"} for n in NAMES]
    run.file("data").mkdir()
    pd.DataFrame(rows).to_parquet(run.file("data/eval.parquet"))
    run.file("data/anecdote.json").write_text("{}")
    run.file("data/benchmark.jsonl").touch()
    scored = pd.DataFrame({"id": NAMES, "kind": "open", "group": NAMES})
    models = []
    for word in ("alder", "birch"):
        answers = {name: {"text": f"hm of {word} {EVIL}</think>{word} says {name} {EVIL}"} for name in NAMES}
        models.append(Evaluation(answers, {}, scored, pd.DataFrame()))
    models[0].answers["row 7"] = {"text": "alder thinks and thinks"}
    return run, *models


@pytest.fixture
def rated(tmp_path):
    run, base, tuned = make(tmp_path)
    return run, base, tuned, write_rating_page(run, base, tuned)


def press(driver, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def shown(driver):
    """The one pair on display."""
    (article,) = (article for article in driver.find_elements("tag name", "article") if article.is_displayed())
    return article


def key_for(driver, wanted: str) -> str:
    """The key of a reader who wants the answer with this word in it (or says `equal`, `both bad`)."""
    first = shown(driver).find_element("class name", "reply").get_attribute("textContent")
    return KEYS.get(wanted) or ("1" if wanted in first else "2")


def test_fifty_pairs_by_keyboard_reloaded_in_the_middle_saved_and_scored(rated, driver, tmp_path):
    from selenium.webdriver.common.keys import Keys

    run, base, tuned, page = rated
    driver.set_window_size(1200, 900)
    driver.get(page.as_uri())
    wanted = ["birch"] * 29 + ["alder"] * 12 + ["equal"] * 6 + ["both bad"] * 3
    for i, want in enumerate(wanted):
        if i == 25:
            driver.refresh()
            assert driver.find_element("id", "state").text == "Question 26 of 50, 25 not rated yet."
        if i == 30:  # back, another choice, and forward again
            press(driver, Keys.ARROW_LEFT)
            assert driver.find_element("css selector", "[aria-pressed=true]").get_attribute("data-choice") in "12"
            press(driver, "0")
            press(driver, Keys.ARROW_LEFT)
            press(driver, key_for(driver, "alder"))
        press(driver, key_for(driver, want))
    assert "all rated. Save the file" in driver.find_element("id", "state").text
    driver.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    press(driver, "s")
    saved = tmp_path / "ratings.json"
    deadline = time.monotonic() + 20
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    ratings = json.loads(saved.read_text(encoding="utf-8"))["ratings"]
    assert [set(rating) for rating in ratings] == [{"pair", "choice"}] * 50
    assert Counter(rating["choice"] for rating in ratings).keys() == {"1", "2", "equal", "both bad"}
    keep_ratings(run, base, tuned, saved)
    (claim,) = state_preference(run, base, tuned)
    assert (claim["n"], claim["share"], claim["p_value"]) == (41, 29 / 41, binomtest(29, 41).pvalue)
    assert "6 equal, 3 both bad, 0 of 50 not rated" in claim["sentence"] and claim["verdict"] == "better"


def test_nothing_in_the_source_depends_on_whose_answer_stands_where(rated, monkeypatch):
    """With every pair turned round, only texts change places; the file in which the order is kept is not in the page."""
    run, base, tuned, page = rated
    pairs = draw_pairs(run, base, tuned)
    turned = [Pair(pair.id, pair.models[::-1], pair.texts[::-1]) for pair in pairs]
    sources = [page.read_text(encoding="utf-8").replace(digest_pairs(pairs), "digest")]
    monkeypatch.setattr("utils.report.answers_page.draw_pairs", lambda *_: turned)
    text = write_rating_page(run, base, tuned).read_text(encoding="utf-8")
    sources.append(text.replace(digest_pairs(turned), "digest"))
    first, second = (
        source.replace("alder", "tree").replace("birch", "tree").split('<article class="card"') for source in sources
    )
    same = [one == other for one, other in zip(first, second, strict=True)]
    assert len(same) == 51 and [one for one, alike in zip(first, same, strict=True) if not alike] == [
        one
        for one in first
        if "thinks and thinks" in one  # the only answer that is not like the other model's
    ]
    lines = [line for line in sources[0].lower().split("\n") if "content-security-policy" not in line]  # its base-uri
    assert not [line for line in lines for word in ("base", "tuned", "fine-t", "swap") if word in line]
    assert json.loads(run.file("comparison/rating_key.json").read_text())["seed"] not in sources[0]


def test_a_question_stands_there_once_with_its_reasoning_folded_away(rated, driver):
    driver.get(rated[3].as_uri())
    article = shown(driver)
    assert article.text.count("What of ") == 1 and "hm of" not in article.text and "why" not in article.text
    for summary in article.find_elements("tag name", "summary"):  # one may be row 7's, which never ends
        summary.click()
    assert "hm of" in article.text
    (endless,) = (a for a in driver.find_elements("tag name", "article") if a.get_attribute("data-pair") == "row 7")
    assert "still reasoning when it reached the limit" in endless.get_attribute("textContent")


def test_markup_in_answers_is_text_and_no_script_but_the_pages_own_may_run(rated, driver):
    driver.get(rated[3].as_uri())
    assert driver.execute_script("return window.ran") is None
    assert driver.execute_script("return document.querySelectorAll('script, img, article b').length") == 1
    assert EVIL in shown(driver).find_element("css selector", ".reply > .text").text
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    )
    assert driver.execute_script("return window.ran") is None
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_it_is_used_by_thumb_on_a_phone_and_nothing_scrolls_sideways(rated, driver):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        driver.get(rated[3].as_uri())
        buttons = driver.find_elements("tag name", "button")
        assert all(button.size["height"] >= 44 for button in buttons) and len(buttons) == 7
        driver.find_element("css selector", "button[data-choice='2']").click()
        assert "Question 2 of 50, 49 not rated yet." in driver.find_element("id", "state").text
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_browser_that_keeps_nothing_says_so_and_rates_on(rated, driver):
    refuse = "Storage.prototype.setItem = Storage.prototype.getItem = () => { throw new Error('refused') }"
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    try:
        driver.get(rated[3].as_uri())
        press(driver, "1")
        assert driver.find_element("id", "state").text.startswith(
            "Question 2 of 50, 49 not rated yet. This browser keeps"
        )
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_a_run_without_answers_has_nothing_to_rate(tmp_path):
    run, *_ = make(tmp_path)
    silent = Evaluation({}, {}, pd.DataFrame({"id": [], "kind": [], "group": []}), pd.DataFrame())
    text = write_rating_page(run, silent, silent).read_text(encoding="utf-8")
    assert "<article" not in text and "<button" not in text and "No question of this run" in text
