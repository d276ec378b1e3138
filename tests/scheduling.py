"""Which tests of pytest-xdist share a worker: those of a file, and those of files that ask for the same long fixture."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

ONE_CLONE = tuple(f"tests/end_to_end/test_{name}.py" for name in ("gate", "pipeline", "remotes"))
"""Each worker that meets the fixture `reproduced` would run the whole pipeline for it."""


class ByFixture(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "one clone" if file in ONE_CLONE else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFixture:
    return ByFixture(config, log)
