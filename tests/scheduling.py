"""Which tests of pytest-xdist share a worker, and which come first: the long ones, so that no worker waits for the other at the end."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

ONE_CLONE = tuple(f"tests/end_to_end/test_{name}.py" for name in ("gate", "pipeline", "remotes"))
"""Each worker that meets the fixture `reproduced` would run the whole pipeline for it."""
LONG = ("tests/servers/test_nights.py", *ONE_CLONE, "tests/end_to_end/test_real.py")


class ByFixture(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "one clone" if file in ONE_CLONE else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFixture:
    return ByFixture(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return LONG.index(file) if file in LONG else len(LONG)

    items.sort(key=rank)
