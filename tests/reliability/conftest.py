"""One warm process and one workspace for all tests of reliability."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.workspace import Warm, Workspace, prepare


@pytest.fixture(scope="session")
def warm(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    process = Warm(root, tmp_path_factory.mktemp("warm"))
    yield process
    process.stop()


@pytest.fixture(scope="session")
def workspace(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return prepare(tmp_path_factory.mktemp("workspace"), warm)
