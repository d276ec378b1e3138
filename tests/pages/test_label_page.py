"""Two people judge in a real browser, by keyboard; a reload and a killed server lose nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.data.files import read_file
from pipelines.labelling.session import open_session
from posttrain import network
from posttrain.guard import signal_at_parents_death
from tests.pages.browsing import PATIENCE_MS, PHONE
from tests.pipelines.labelling.sessions import session

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.servers]
SEES = {"ann": 0, "bob": 1}
"""The answer that each annotator likes: ann the one that ends with its digit, bob the one that ends with x; both like model-0 in 0 to 5."""


class Server:
    """`posttrain label` as users run it."""

    def __init__(self, project: Path, port: int, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.log = project / "label.log"
        command = [sys.executable, "-m", "pipelines.commands", "label", "--name", "test", "--port", str(port)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *arguments], cwd=project, stdout=output, stderr=subprocess.STDOUT, env=environment,
                preexec_fn=signal_at_parents_death,
            )  # fmt: skip
        ready = lambda: "judge them at" in self.log.read_text()  # noqa: E731
        if not network.wait_until(ready, lambda: self.process.poll() is None, 300):
            raise AssertionError(self.log.read_text())
        self.address = re.search(r"http://\S+", self.log.read_text())[0]  # type: ignore[index]

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(60)


@pytest.fixture
def project(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project with a session of 12 pairs."""
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    session(tmp_path / "labels" / "test")
    monkeypatch.delenv("POSTTRAIN_INBOX", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(root))
    return tmp_path


@pytest.fixture
def server(project: Path) -> Iterator[Server]:
    started = Server(project, network.free_port())
    yield started
    if started.process.poll() is None:
        started.stop(signal.SIGTERM)


def arrive(browser: Browser, address: str, name: str) -> Page:
    """Open the page on a phone-sized screen and begin."""
    page = browser.new_page(viewport=PHONE)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Item 1 of").wait_for()
    return page


def judge(page: Page, annotator: str, done: int, total: int = 12) -> None:
    """Judge one item with a key and wait for the next one."""
    item = int(page.locator("#prompt pre").inner_text().split("+")[0])
    liked = 0 if item < 6 else SEES[annotator]
    shown = page.locator("#answers pre").all_inner_texts()
    place = next(i for i, text in enumerate(shown) if text.startswith(f"{item}.{liked}"))
    page.keyboard.press(("1", "2")[place])
    following = "Done" if done + 1 == total else f"Item {done + 2} of"
    page.get_by_role("heading", name=following).wait_for()


def test_two_people_judge_and_nothing_is_lost(browser: Browser, project: Path, server: Server) -> None:
    ann = arrive(browser, server.address, "ann")
    assert ann.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert ann.get_by_role("button", name="First is better").is_visible()
    assert ann.get_by_role("region", name="Second answer").is_visible()
    assert not ann.get_by_text("Keys: 1").is_visible(), "a phone has no keys"
    assert ann.get_by_role("progressbar", name="Progress").count() == 1
    for done in range(4):
        judge(ann, "ann", done)
    ann.reload()
    ann.get_by_role("heading", name="Item 5 of 12").wait_for()
    judge(ann, "ann", 4)
    ann.keyboard.press("u")
    ann.get_by_role("heading", name="Item 5 of 12").wait_for()
    for done in range(4, 7):
        judge(ann, "ann", done)

    server.stop(signal.SIGKILL)
    ann.keyboard.press("1")  # the server is down: the page keeps it and sends it again
    ann.get_by_text("The server does not answer").wait_for()
    port = int(server.address.split(":")[2].split("/")[0])
    again = Server(project, port)
    assert again.address == server.address
    ann.get_by_role("heading", name="Item 9 of 12").wait_for()
    ann.keyboard.press("u")
    ann.get_by_role("heading", name="Item 8 of 12").wait_for()
    for done in range(7, 12):
        judge(ann, "ann", done)
    bob = arrive(browser, again.address, "bob")
    for done in range(12):
        judge(bob, "bob", done)
    again.stop(signal.SIGTERM)

    kept = read_file(project / "labels" / "test" / "judgements.jsonl")
    assert len(kept) == 24
    assert {(each["annotator"], each["task"]): each["value"] for each in kept} == {
        (name, str(i)): 0 if i < 6 else liked for name, liked in SEES.items() for i in range(12)
    }
    handed = [row for path in sorted((project / "inbox" / "preferences").iterdir()) for row in read_file(path)]
    assert len(handed) == 24
    assert sum(row["chosen"].endswith("x") for row in handed) == 6
    assert {row["annotator"] for row in handed} == {"ann", "bob"}
    summary = json.loads((project / "labels" / "test" / "summary.json").read_text())
    # 12 of 24 ordered pairs disagree; by chance 2 x 18 x 6 of 24 x 23
    assert summary["krippendorff_alpha"] == pytest.approx(1 - (12 / 24) / (216 / 552))
    assert "between people: Krippendorff's alpha -0.28" in again.log.read_text()


def test_a_kept_judgement_stays_its_annotators_and_two_tabs_count_once(browser: Browser, project: Path) -> None:
    server = Server(project, network.free_port())
    port = int(server.address.split(":")[2].split("/")[0])
    context = browser.new_context()
    tabs = [context.new_page() for _ in range(2)]
    for tab in tabs:
        tab.set_default_timeout(PATIENCE_MS)
        tab.goto(server.address)
        for refused in ("judge/ann", "a" * 41):
            tab.get_by_label("Your name").evaluate(
                "(field, name) => { field.removeAttribute('maxlength'); field.value = name }", refused
            )
            tab.get_by_label("Your name").press("Enter")
            tab.locator("#problem").get_by_text("name").wait_for()
        tab.get_by_label("Your name").fill("\u05d0nn \U0001f600 <b>")
        tab.keyboard.press("Enter")
        tab.get_by_role("heading", name="Item 1 of").wait_for()
    tabs[0].keyboard.press("=")
    tabs[0].get_by_role("heading", name="Item 2 of").wait_for()
    tabs[1].keyboard.press("b")  # the same item, which is judged already: the first judgement stays
    tabs[1].get_by_role("heading", name="Item 2 of").wait_for()
    tabs[1].goto("about:blank")
    tabs[1].go_back()
    tabs[1].get_by_role("heading", name="Item 2 of").wait_for()

    server.stop(signal.SIGKILL)
    tabs[0].keyboard.press("b")
    tabs[0].get_by_text("The server does not answer").wait_for()
    again = Server(project, port)
    tabs[0].get_by_role("heading", name="Item 3 of").wait_for()
    again.stop(signal.SIGKILL)
    tabs[0].keyboard.press("b")
    tabs[0].get_by_text("The server does not answer").wait_for()
    tabs[0].evaluate("document.getElementById('start').hidden = false")
    tabs[0].get_by_label("Your name").fill("bob")
    tabs[0].get_by_label("Your name").press("Enter")
    last = Server(project, port)
    tabs[0].get_by_text("bob").wait_for()
    last.stop(signal.SIGTERM)
    kept = read_file(project / "labels" / "test" / "judgements.jsonl")
    assert [(each["annotator"], each["value"]) for each in kept] == [
        ("\u05d0nn \U0001f600 <b>", v) for v in ("tie", "bad", "bad")
    ]


def test_scores_and_rankings_by_keyboard(browser: Browser, project: Path) -> None:
    for ask, keys, value in (("scores", "730", [7, 3, 10]), ("ranking", "31", [2, 0, 1])):
        made = session(project / "labels" / "test", count=1, ask=ask, answers=3)
        (made.folder / "journal.jsonl").unlink(missing_ok=True)
        server = Server(project, network.free_port())
        page = arrive(browser, server.address, "ann")
        for key in keys:
            page.keyboard.press(key)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Done").wait_for()
        server.stop(signal.SIGTERM)
        (kept,) = read_file(made.folder / "judgements.jsonl")
        places = open_session(made.folder).places("ann", "0")
        expected = [value[places.index(i)] for i in range(3)] if ask == "scores" else [places[i] for i in value]
        assert kept["value"] == expected


def test_text_stays_text(browser: Browser, project: Path) -> None:
    path = project / "labels" / "test" / "items.jsonl"
    path.write_text(path.read_text().replace("+0=", "<img src=x onerror=document.title=1><b>bold</b>"))
    server = Server(project, network.free_port())
    page = arrive(browser, server.address, "<i>ann</i>")
    assert "<b>bold</b>" in page.locator("#prompt").inner_text()
    assert page.locator("#prompt img, #prompt b, #who i").count() == 0
    assert page.title() == "Judge answers"
    server.stop(signal.SIGTERM)
