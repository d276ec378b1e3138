"""The labelling server: judgements by request, refused strangers, and a hand-over when an annotator has finished."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.data.files import read_file
from pipelines.labelling.judgements import Desk
from pipelines.labelling.preferences import hand_over
from pipelines.labelling.server import FILES, application
from tests import coroutines
from tests.pipelines.labelling.sessions import session

PORT, TOKEN = 5050, "secret"
GOOD = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(session(tmp_path / "s", count=2))
    yield made
    made.close()


Sent = tuple[str, str, dict[str, Any], dict[str, str]]


def send(desk: Desk, *requests: Sent, handed: list[str | None] | None = None) -> list[httpx.Response]:
    """Send (method, path, body, headers) one after the other."""
    batches = [] if handed is None else handed
    hand_over = lambda annotator: batches.append(annotator) or len(batches)  # noqa: E731

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(application(desk, hand_over, PORT, TOKEN))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{PORT}") as client:
            return [await client.request(m, path, json=body or None, headers=h) for m, path, body, h in requests]

    return coroutines.run(run())


def test_strangers_are_refused_and_texts_have_no_other_reader(desk: Desk) -> None:
    ann = {"annotator": "ann"}
    tried = [{}, {"Authorization": "Bearer x"}, GOOD | {"Origin": "http://evil.example"}, GOOD | {"Host": "evil.example"}]  # fmt: skip
    for path in ("/state", "/judge", "/undo", "/finish"):
        answers = send(desk, *(("POST", path, ann, headers) for headers in tried))
        assert [answer.status_code for answer in answers] == [401, 401, 403, 403], path
    good, rebound = send(desk, ("POST", "/state", ann, GOOD), ("GET", "/", {}, {"Host": "evil.example"}))
    assert (good.status_code, rebound.status_code) == (200, 403)
    assert good.headers["cache-control"] == "no-store"
    assert desk.judgements() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": "k" * 101}, "key: String should have at most 100 characters"),
        ({"key": "\ud800"}, "half of a surrogate pair"),
        ({"value": float("nan")}, "a number is NaN or infinite"),
        ({"annotator": 1}, "annotator: Input should be a valid string"),
    ],
)
def test_a_body_that_cannot_be_stored_is_refused(desk: Desk, change: dict[str, Any], words: str) -> None:
    """Send texts that a UTF-8 journal cannot hold, and a key that would be kept as long as the session."""
    text = json.dumps({"annotator": "ann", "task": "0", "key": "k", "value": "tie"} | change)

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(application(desk, lambda: 0, PORT, TOKEN))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{PORT}") as client:
            return await client.post("/judge", content=text, headers=GOOD | {"Content-Type": "application/json"})

    answer = coroutines.run(post())
    assert answer.status_code == 422
    assert words in answer.json()["error"]
    assert desk.judgements() == []


def test_the_page_needs_only_its_own_files(desk: Desk) -> None:
    answers = send(desk, *(("GET", path, {}, {}) for path in FILES))
    assert [answer.status_code for answer in answers] == [200] * len(FILES)
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
    page = answers[0].text
    assert '<script src="/label.js" defer></script>' in page
    assert page.count("<script") == 1
    assert "innerHTML" not in answers[1].text


def test_the_last_judgement_hands_over(desk: Desk) -> None:
    handed: list[str | None] = []
    for i, task in enumerate(desk.session.tasks("ann")):
        body = {"annotator": "ann", "task": task, "key": f"k{i}", "value": "tie"}
        (answer,) = send(desk, ("POST", "/judge", body, GOOD), handed=handed)
        assert answer.json()["done"] == i + 1
    assert handed == ["ann"]
    bad = {"annotator": "bob", "task": "0", "key": "k9", "value": "best"}
    (refused,) = send(desk, ("POST", "/judge", bad, GOOD))
    assert refused.status_code == 422
    assert "no judgement here; valid: first, second, tie, bad, or skip" in refused.json()["error"]


def test_an_annotator_who_ends_hands_over_only_his_own(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    made = Desk(session(tmp_path / "s", count=2))
    app = application(made, lambda who: hand_over(made, str(inbox), scores=False, only=who), PORT, TOKEN)

    async def post(client: httpx.AsyncClient, path: str, name: str, **more: Any) -> Any:
        return (await client.post(path, json={"annotator": name} | more, headers=GOOD)).json()

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{PORT}") as client:
            assert (await post(client, "/judge", "bob", task="0", key="b0", value="first"))["can_undo"]
            for task in ("0", "1"):
                await post(client, "/judge", "ann", task=task, key=f"a{task}", value="first")
            assert annotators() == ["ann", "ann"]
            assert (await post(client, "/state", "bob"))["can_undo"], "bob is in the middle of his session"
            await post(client, "/undo", "bob")
            await post(client, "/judge", "bob", task="0", key="b1", value="second")
            assert (await post(client, "/finish", "bob"))["handed"] == 1
            assert annotators() == ["ann", "ann", "bob"]

    def annotators() -> list[str]:
        return sorted(str(row["annotator"]) for path in inbox.rglob("*.jsonl") for row in read_file(path))

    coroutines.run(run())
    made.close()
