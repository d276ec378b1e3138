"""Shared fixtures: paths, and one thread, on which small models run fastest and give the same numbers everywhere."""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path

import pytest

from pipelines.runtime import environment
from tests.compiled import compile_project, in_parallel, rewrite_tests

environment.quiet()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start: two that wait for each other spin

# Torch, Prefect and the collected tests are millions of objects that stay; looking through them again takes an eighth of the time.
gc.set_threshold(100_000, 50, 100)

pytest_plugins = ["tests.orchestration", "tests.scheduling"]


LONG = ("tests/servers/", "tests/end_to_end/", "tests/flows/", "tests/reliability/", "tests/security/", "tests/tasks/")
"""Folders of tests that wait for processes. They come first, so that the longest file is not the last one."""


def pytest_configure(config: pytest.Config) -> None:
    """Compile the project and its tests before pytest starts its workers; keep torch in a process that runs tests to one thread."""
    root, is_worker = Path(__file__).parents[1], hasattr(config, "workerinput")
    if not is_worker and config.getoption("numprocesses", None):
        in_parallel(partial(compile_project, root), partial(rewrite_tests, root, config))
        return
    if not is_worker:
        compile_project(root)
    import torch  # not above: the process that distributes tests needs no torch

    torch.set_num_threads(1)


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
