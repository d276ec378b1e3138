"""The webhook is told what happened and where to look; its absence hurts nobody."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tasks.notify import notify

Bodies = list[dict[str, Any]]


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bodies]:
    bodies: Bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if bodies[-1]["event"] == "failed" else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("POSTTRAIN_WEBHOOK", f"http://127.0.0.1:{server.server_port}/hook?token=not-for-logs")
    yield bodies
    server.shutdown()
    server.server_close()


def test_the_body_says_what_happened_and_where_to_look_without_secrets(webhook: Bodies) -> None:
    link = "http://someone:a-password@mlflow:5000/#/models/posttrain/versions/3"
    assert notify("refused", "version 3 was refused", {"model": link, "flow run": None})
    shown = "http://***@mlflow:5000/#/models/posttrain/versions/3"
    assert webhook == [
        {"event": "refused", "text": f"version 3 was refused\nmodel: {shown}", "links": {"model": shown}}
    ]


def test_a_webhook_that_fails_or_is_away_fails_nothing(
    webhook: Bodies, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not notify("failed", "x", {})
    monkeypatch.setenv("POSTTRAIN_WEBHOOK", "http://127.0.0.1:9/hook")
    assert not notify("promoted", "x", {})
    printed = capsys.readouterr().out
    assert "the webhook was not told of `failed`: HTTP Error 500" in printed
    assert "the webhook was not told of `promoted`" in printed
    assert "not-for-logs" not in printed
    monkeypatch.delenv("POSTTRAIN_WEBHOOK")
    assert not notify("promoted", "x", {})
