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


SHARED = {"prefect_url": "prefect", "reproduced": "pipeline"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is costly to make is made by one worker: tests that share it run there, and the tests of a file stay together."""
    for item in items:
        shared = [group for fixture, group in SHARED.items() if fixture in getattr(item, "fixturenames", ())]
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(shared[0] if shared else item.path.name))
