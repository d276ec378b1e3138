"""The webhook is told what happened and where to look; its absence hurts nobody."""

from __future__ import annotations

import pytest

from tasks.notify import notify
from tests.webhook import listening


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
    printed = capsys.readouterr().out
    assert "the webhook was not told of `failed`: HTTP Error 500" in printed
    assert "the webhook was not told of `promoted`" in printed
    assert "not-for-logs" not in printed
    monkeypatch.delenv("POSTTRAIN_WEBHOOK")
    assert not notify("promoted", "x", {})
