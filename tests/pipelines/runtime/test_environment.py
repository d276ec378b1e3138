"""What every command sets before its tools are imported."""

from __future__ import annotations

import os
from urllib.error import URLError
from urllib.request import build_opener

import pytest

from pipelines.runtime import environment
from tests.webhook import listening


@pytest.mark.parametrize("mine", [None, "intranet,.example.com"])
def test_servers_of_our_own_are_reached_past_a_proxy(monkeypatch: pytest.MonkeyPatch, mine: str | None) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, mine or "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with listening() as (url, told):
        with pytest.raises(URLError):
            build_opener().open(url, b"{}", timeout=10)
        environment.quiet()
        environment.quiet()
        build_opener().open(url, b"{}", timeout=10).close()
    assert told == [{}]
    expected = ["127.0.0.1", "localhost"]
    assert os.environ["no_proxy"].split(",") == [*(mine.split(",") if mine else ()), *expected]


def test_without_a_proxy_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    environment.quiet()
    assert "no_proxy" not in os.environ
