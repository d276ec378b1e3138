"""The loop: two people judge answers in a browser, the night trains on them, and the new champion answers in the terminal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from pipelines.commands.configure import configure
from pipelines.data.files import read_file
from pipelines.labelling.session import open_session
from pipelines.promotion.registry import Registry
from pipelines.tracking.content import folder_md5
from posttrain import network
from tests.end_to_end.conftest import Clone, new_clone  # noqa: F401  (a fixture)
from tests.pages.browsing import PHONE
from tests.pages.test_label_page import Server, arrive
from tests.servers.conftest import tables

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(3000)]
ITEMS = 12


def judge(page: Page, disagrees: bool, done: int) -> None:
    """Judge one item by a key. The right answer is 1, and 0 is better than none; someone who disagrees chooses the opposite."""
    first, second = ({"1": 2, "0": 1}.get(text.strip(), 0) for text in page.locator("#answers pre").all_inner_texts())
    key = "=" if first == second else "12"[(second > first) != disagrees]
    page.keyboard.press(key)
    following = "Done" if done + 1 == ITEMS else f"Item {done + 2} of"
    page.get_by_role("heading", name=following).wait_for()


def alpha(judgements: list[dict[str, object]]) -> float:
    """Krippendorff's nominal alpha of two annotators who judged every item, by its definition."""
    by_item: dict[object, list[object]] = {}
    for each in judgements:
        by_item.setdefault(each["task"], []).append(each["value"])
    differing = sum(first != second for first, second in by_item.values())
    counts, n = Counter(map(str, (each["value"] for each in judgements))), len(judgements)
    expected = 1 - sum(count * (count - 1) for count in counts.values()) / (n * (n - 1))
    return 1 - (2 * differing / n) / expected


def test_people_judge_the_night_trains_and_the_new_champion_answers(
    browser: Browser,
    new_clone: Callable[[], Clone],  # noqa: F811
) -> None:
    clone = new_clone()
    configure(clone.root / "params.yaml", [str(clone.root / "tests/servers/tiny.yaml")])
    tables(clone.root)
    clone.repro("sft")
    environment = clone.environment(TQDM_DISABLE="1")
    asked = ("sft", "--count", str(ITEMS), "--answers", "4", "--temperature", "1.5")
    server = Server(clone.root, network.free_port(), *asked, environment=environment)
    port = int(server.address.split(":")[2].split("/")[0])

    assert len(open_session(clone.root / "labels" / "test").items) == ITEMS
    ann, bob = arrive(browser, server.address, "ann"), arrive(browser, server.address, "bob")
    assert ann.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    for done in range(4):
        judge(ann, False, done)
        judge(bob, done == 2, done)
    ann.reload()
    ann.get_by_role("heading", name="Item 5 of 12").wait_for()
    server.stop(signal.SIGKILL)
    ann.keyboard.press("=")
    ann.get_by_text("The server does not answer").wait_for()
    server = Server(clone.root, port, *asked, environment=environment)
    ann.get_by_role("heading", name="Item 6 of 12").wait_for()
    ann.keyboard.press("u")
    ann.get_by_role("heading", name="Item 5 of 12").wait_for()
    for done in range(4, ITEMS):
        judge(ann, False, done)
        judge(bob, done == 7, done)
    server.stop(signal.SIGTERM)

    session = clone.root / "labels" / "test"
    kept = read_file(session / "judgements.jsonl")
    assert Counter(each["annotator"] for each in kept) == {"ann": ITEMS, "bob": ITEMS}
    summary = json.loads((session / "summary.json").read_text())
    assert summary["krippendorff_alpha"] == pytest.approx(alpha(kept))
    decided = [each for each in kept if isinstance(each["value"], int)]
    files = sorted((clone.root / "inbox/preferences").iterdir())
    handed = [row for path in files for row in read_file(path)]
    assert len(handed) == len(decided) > 0

    said = clone.run("flows.retrain", POSTTRAIN_SETTLE_SECONDS="0").stdout
    # a later file in which both people judged alike holds no new row
    taken = re.findall(r"inbox: (?:accepted|known already) preferences/([\w.-]+):", said)
    assert taken == [path.name for path in files]
    assert "is champion, in place of the supervised model" in said
    trained = (clone.root / "data/valid/preferences.parquet", clone.root / "data/valid/preferences_heldout.parquet")
    from pipelines.data.tables import read_rows

    assert sum(len(read_rows(path)) for path in trained) >= 60
    lineage = json.loads(clone.run("pipelines.commands.lineage", "champion", "--json").stdout)
    assert {name for counts in lineage["annotators"].values() for name in counts} == {"ann", "bob"}

    champion = Registry(clone.root, "posttrain").holding("champion")
    assert champion is not None
    assert folder_md5(clone.root / "models/champion") == champion.md5
    chat = subprocess.run(
        [sys.executable, "-m", "pipelines.commands", "chat", "--temperature", "0", "--max-new-tokens", "8"],
        cwd=clone.root, env=environment, input="e0?\n/quit\n", capture_output=True, text=True,
    )  # fmt: skip
    assert chat.returncode == 0, chat.stderr
    assert "champion> 1" in chat.stdout
