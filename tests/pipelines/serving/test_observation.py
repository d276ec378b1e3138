"""A logged share of the requests, and a shadow whose answers nobody but the log sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.runtime.journal import Record
from pipelines.serving.answer_log import AnswerLog
from pipelines.serving.batching import Batcher
from pipelines.serving.models import Models, Served
from pipelines.serving.observation import Observer
from pipelines.serving.server import application
from pipelines.tracking.served import ServedTraces, read_served
from posttrain.errors import TrackingError
from tests import coroutines
from tests.pipelines.serving.test_server import HEADERS, PORT, TOKEN, tiny


class NoStore(ServedTraces):
    """Traces whose MLflow is down."""

    def add(self, records: Any) -> None:
        raise TrackingError("MLflow did not accept the served answers")


@pytest.fixture
def models() -> Iterator[Models]:
    made = Models({"champion": Served("champion", "aaaa.dir", "3", Batcher(tiny(0)))})
    yield made
    made.close()


def ask(
    models: Models, observer: Observer, *requests: dict[str, Any], path: str = "completions"
) -> list[httpx.Response]:
    """Send requests one after the other, then end the observer."""

    async def gather() -> list[httpx.Response]:
        transport = httpx.ASGITransport(application(models, PORT, TOKEN, 12, observer))
        base = f"http://127.0.0.1:{PORT}"
        async with httpx.AsyncClient(transport=transport, base_url=base, headers=HEADERS, timeout=120) as client:
            return [await client.post(f"/v1/{path}", json={"model": "champion"} | each) for each in requests]

    try:
        return coroutines.run(gather())
    finally:
        observer.close()


def observer(project: Path, share: float, shadow: Served | None = None, shadow_share: float = 1.0) -> Observer:
    return Observer(AnswerLog(project, share, NoStore(project, "posttrain")), shadow, shadow_share)


def by_shadow(records: list[Record], shadow: bool) -> list[Record]:
    return [record for record in records if record["shadow"] is shadow]


def test_answers_are_logged_with_their_version_although_mlflow_is_down(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    streamed = {"prompt": "2+2=", "seed": 2, "stream": True}
    key = "sk-abcdefghijklmnopqrstuvwx"
    first, _, ids, _ = ask(
        models,
        observer(tmp_path, 1.0),
        {"prompt": f"{key}", "seed": 1, "n": 2},
        streamed,
        {"prompt": [5, 6, 7]},
        {"prompt": "1", "top_p": 0.5},
    )
    records = read_served(tmp_path)
    assert [record["prompt"] for record in records] == ["***", "***", "2+2=", tiny(0).encoder.text([5, 6, 7])]
    assert [record["completion"] for record in records[:2]] == [each["text"] for each in first.json()["choices"]]
    assert records[3]["completion"] == ids.json()["choices"][0]["text"]
    assert {(r["model"], r["version"], r["md5"]) for r in records} == {("champion", "3", "aaaa.dir")}
    assert len({record["id"] for record in records}) == 4
    assert records[0]["request"] == first.json()["id"]
    assert capsys.readouterr().err.count("MLflow did not accept the served answers") == 1


def test_nothing_is_logged_unless_it_is_asked_for(models: Models, tmp_path: Path) -> None:
    ask(models, observer(tmp_path, 0.0), {"prompt": "1+1="})
    assert read_served(tmp_path) == []


def test_the_shadow_answers_the_same_requests_and_its_answers_are_only_logged(models: Models, tmp_path: Path) -> None:
    shadow = Served("challenger", "bbbb.dir", "4", Batcher(tiny(1)))
    messages = [{"role": "user", "content": "hi"}]
    asked = [{"messages": messages, "seed": seed, "max_tokens": 10} for seed in range(5)]
    watched = ask(models, observer(tmp_path, 0.0, shadow), *asked, path="chat/completions")
    alone = ask(models, observer(tmp_path / "other", 0.0), *asked, path="chat/completions")
    texts = [each.json()["choices"][0]["message"]["content"] for each in watched]
    assert texts == [each.json()["choices"][0]["message"]["content"] for each in alone]
    assert {each.json()["system_fingerprint"] for each in watched} == {"version 3, md5 aaaa.dir"}
    records = sorted(
        read_served(tmp_path), key=lambda record: [each.json()["id"] for each in watched].index(record["request"])
    )
    assert [record["completion"] for record in by_shadow(records, False)] == texts
    others = Models({"champion": Served("champion", "bbbb.dir", "4", Batcher(tiny(1)))})
    own = ask(others, observer(tmp_path / "own", 0.0), *asked, path="chat/completions")
    others.close()
    assert [record["completion"] for record in by_shadow(records, True)] == [
        each.json()["choices"][0]["message"]["content"] for each in own
    ], "the shadow's own answers, with the same seeds"
    assert {(r["model"], r["version"]) for r in by_shadow(records, True)} == {("challenger", "4")}
    assert not (tmp_path / "other/.posttrain").exists()


def test_a_shadow_that_cannot_answer_disturbs_no_request(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mute = tiny(1)
    mute.encoder.tokenizer.chat_template = None
    shadow = Served("challenger", "bbbb.dir", "4", Batcher(mute))
    messages = [{"role": "user", "content": "hi"}]
    (answer,) = ask(models, observer(tmp_path, 0.0, shadow), {"messages": messages}, path="chat/completions")
    assert answer.status_code == 200
    assert [record["model"] for record in read_served(tmp_path)] == ["champion"]
    assert "the shadow challenger did not answer: challenger has no chat template" in capsys.readouterr().err
