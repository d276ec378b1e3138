"""Servers that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import small
from tests.rollouts.peer import Peer
from tests.rollouts.served import Setup


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Setup]]:
    peers: list[Peer] = []

    def make(servers: int = 1, policy: Any = None, at_first: Any = None) -> Setup:
        own = [Peer(at_first or small.language_model(seed=9)).start() for _ in range(servers)]
        peers.extend(own)
        return Setup(tmp_path / "served", policy or small.language_model(), own)

    yield make
    for peer in peers:
        peer.stop()
