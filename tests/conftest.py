"""Paths that every test may need."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import environment

environment.quiet()

pytest_plugins = ["tests.orchestration"]


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data(root: Path) -> Path:
    """Public data sets in their original form, which live beside the checkout."""
    folder = (root / ".." / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder
