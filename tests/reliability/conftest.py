"""One workspace for all tests of reliability."""

from __future__ import annotations

import pytest

from tests.reliability.workspace import Warm, Workspace, prepare


@pytest.fixture(scope="session")
def workspace(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return prepare(tmp_path_factory.mktemp("workspace"), warm)
