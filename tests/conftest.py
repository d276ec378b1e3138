"""Shared fixtures: paths, and one thread, on which small models run fastest and give the same numbers everywhere."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from pipelines.runtime import environment
from tests.compiled import compile_project

environment.quiet()
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start: two that wait for each other spin

# Torch, Prefect and the collected tests are millions of objects that stay; looking through them again takes an eighth of the time.
gc.set_threshold(100_000, 50, 100)

pytest_plugins = ["tests.orchestration", "tests.scheduling"]


LONG = ("tests/servers/", "tests/end_to_end/", "tests/flows/", "tests/reliability/", "tests/security/", "tests/tasks/")
"""Folders of tests that wait for processes. They come first, so that the longest file is not the last one."""


def pytest_configure(config: pytest.Config) -> None:
    """Compile the project before pytest starts its workers."""
    if not hasattr(config, "workerinput"):
        compile_project(Path(__file__).parents[1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first; the order within a file stays."""
    items.sort(key=lambda item: next((i for i, part in enumerate(LONG) if part in item.path.as_posix()), len(LONG)))


def pytest_collection_finish() -> None:
    """Leave modules and tests, which stay, out of later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the project's root."""
    return Path(__file__).parents[1]


def beside(root: Path, name: str) -> Path:
    """Return a folder of inputs that stand next to the checkout, or skip the test if they are absent."""
    folder = (root / ".." / "shared" / name).resolve()
    if not folder.is_dir():
        pytest.skip(f"no inputs at {folder}")
    return folder


@pytest.fixture(scope="session")
def shared_data(root: Path) -> Path:
    """Return the folder of public data sets in their original form."""
    return beside(root, "data")


@pytest.fixture(scope="session")
def cases(root: Path) -> Path:
    """Return the folder of small inputs as people have them."""
    return beside(root, "cases")
