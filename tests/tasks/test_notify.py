"""The webhook receives the event and its links; a missing webhook breaks nothing."""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tasks import notify as notify_module
from tasks.notify import notify
from tests.sockets import answering
from tests.webhook import listening


def garbage() -> AbstractContextManager[str]:
    """A server that does not speak HTTP."""
    return answering(lambda connection: connection.sendall(b"who is there?\r\n"))


def test_the_body_says_what_happened_and_where_to_look_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    link = "http://someone:a-password@mlflow:5000/#/models/posttrain/versions/3"
    with listening() as (url, told):
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", url)
        assert notify("refused", "version 3 was refused", {"model": link, "flow run": None})
    shown = "http://***@mlflow:5000/#/models/posttrain/versions/3"
    assert told == [{"event": "refused", "text": f"version 3 was refused\nmodel: {shown}", "links": {"model": shown}}]


def test_a_webhook_that_fails_or_is_away_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(500) as (url, _):
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", f"{url}?token=not-for-logs")
        assert not notify("failed", "x", {})
    monkeypatch.setenv("POSTTRAIN_WEBHOOK", "http://127.0.0.1:9/hook?token=not-for-logs")
    assert not notify("promoted", "x", {})
    monkeypatch.setenv("POSTTRAIN_WEBHOOK", "hooks.example.com/services/not-for-logs")  # its http:// was forgotten
    assert not notify("waiting", "x", {})
    monkeypatch.setenv("POSTTRAIN_WEBHOOK", "http://127.0.0.1:9/services/not-for-logs of a team")
    assert not notify("rolled back", "x", {})
    with garbage() as url:
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", url)
        assert not notify("refused", "x", {})
    printed = capsys.readouterr().out
    assert "the webhook did not receive `failed`: HTTP Error 500" in printed
    for event in ("promoted", "waiting", "rolled back", "refused"):
        assert f"the webhook did not receive `{event}`" in printed
    assert "not-for-logs" not in printed
    monkeypatch.delenv("POSTTRAIN_WEBHOOK")
    assert not notify("promoted", "x", {})


@contextmanager
def trickling() -> Iterator[tuple[str, threading.Event]]:
    """A server that never finishes the headers of its answer, and an event that is set once it was asked."""
    asked, stop = threading.Event(), threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        asked.set()
        while not stop.wait(0.05):
            connection.sendall(b"x")

    with answering(answer) as url:
        try:
            yield url, asked
        finally:
            stop.set()


def test_a_webhook_that_trickles_its_answer_holds_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notify_module, "TIMEOUT_SECONDS", 1.0)
    with trickling() as (url, asked):
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", url)
        assert not notify("promoted", "x", {})  # returns while the server goes on
        assert asked.wait(60)
    assert "the webhook did not receive `promoted`: no answer within 1 seconds" in capsys.readouterr().out


def test_a_secret_that_is_no_utf8_signs_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_WEBHOOK_SECRET", os.fsdecode(b"\xff\xfe\xfd\xfc"))
    digest = hmac.new(b"\xff\xfe\xfd\xfc", b"body", hashlib.sha256).hexdigest()
    assert notify_module._signature(b"body") == {"X-Posttrain-Signature": f"sha256={digest}"}
    with listening() as (url, told):
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", url)
        assert notify("promoted", "x", {})
    assert told[0]["event"] == "promoted"
