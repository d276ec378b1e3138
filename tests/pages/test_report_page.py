"""The report on a desktop and on a phone, in both languages: the texts of its first screen, and that nothing is cut.

The pages of validation and of the gate's decision fit a phone, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.promotion.decision import not_judged
from pipelines.promotion.page import page as decision_page
from pipelines.runtime.publish import SHARED_REPORT
from pipelines.validation.check import ValidationOutcome
from pipelines.validation.report import page as validation_page
from tests.pages.browsing import DESKTOP, PHONE

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, ViewportSize

FIRST_SCREEN = {
    "English": (
        "grpo wins; dpo had a different protocol and is not ranked",
        "first of the ranked algorithms by sampled accuracy",
        "tokens sampled and trained on",
        "one run of grpo here",
        "Protocol: 40 held-out problems",
    ),
    "中文": (
        "grpo 胜出；dpo 的协议不同，不参与排名",
        "按采样准确率在参与排名的算法中排第一",
        "采样与训练的 token 数",
        "grpo 单次运行（本机）",
        "评测方法：40 道留出题",
    ),
}


def opened(browser: Browser, project: Path, viewport: ViewportSize, language: str) -> Page:
    page = browser.new_page(viewport=viewport)
    page.goto((project / SHARED_REPORT).as_uri())
    page.get_by_text(language, exact=True).click()
    return page


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("language", ["English", "中文"], ids=["en", "zh"])
def test_the_first_screen_has_the_answer_and_nothing_is_cut(
    browser: Browser, recorded: Path, viewport: ViewportSize, language: str
) -> None:
    page = opened(browser, recorded, viewport, language)
    for text in FIRST_SCREEN[language]:
        box = page.locator(":visible", has_text=text).last.bounding_box()
        assert box is not None, text
        assert box["y"] + box["height"] <= viewport["height"], text
    assert page.locator(".tile b").all_inner_texts()[-1] == "12 s"
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    if viewport is DESKTOP:
        chart = page.locator(".lead img").bounding_box()
        assert chart is not None
        assert chart["y"] + chart["height"] <= viewport["height"]
        assert page.get_by_text("Hollow: not ranked" if language == "English" else "空心：协议不同").first.is_visible()
        wide = "tables => tables.filter(t => t.scrollWidth > t.clientWidth).map(t => t.innerText.slice(0, 80))"
        assert page.locator(".scroll:visible").evaluate_all(wide) == [], "a table of the desktop that must be scrolled"
    page.close()


def test_the_cost_section_has_results_against_tokens_and_wall_time(browser: Browser, recorded: Path) -> None:
    page = opened(browser, recorded, DESKTOP, "English")
    pictures = page.locator("#cost img")
    assert [pictures.nth(i).get_attribute("alt") for i in range(pictures.count())] == [
        "True reward along training against each budget.",
        "The headline measure of every algorithm against its tokens.",
        "The headline measure of every algorithm against its seconds.",
    ]
    text = page.inner_text("#cost")
    assert re.search(r"Measured on \w+, \d+ CPU cores, \d+ GiB of memory; commit", text)
    page.close()


def test_in_chinese_no_sentence_is_english(browser: Browser, recorded: Path) -> None:
    page = opened(browser, recorded, DESKTOP, "中文")
    page.evaluate("document.querySelectorAll('pre, td.text.dim, details').forEach(e => e.remove())")
    lines = page.inner_text("body").splitlines()
    english = [
        line for line in lines if re.search(r"[a-z]+ [a-z]+ [a-z]+ [a-z]+", line) and not re.search(r"[一-鿿]", line)
    ]
    assert english == []
    assert sum(bool(re.search(r"[一-鿿]", line)) for line in lines) > 60
    page.close()


def test_the_pages_of_validation_and_decision_fit_a_phone(browser: Browser) -> None:
    decision = not_judged("grpo-0", "the champion", "an evaluation with other prompts cannot be compared")
    counts = {"preferences_heldout": {f"rows_{'x' * 40}": 7}}
    page = browser.new_page(viewport=PHONE)
    for html in (validation_page(ValidationOutcome(), 5, counts), decision_page(decision, [decision])):
        page.set_content(html)
        assert page.locator("table").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.close()
