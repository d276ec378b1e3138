"""Shared fixtures: paths, and one thread, on which small models run fastest and give the same numbers everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.runtime import environment

environment.quiet()
torch.set_num_threads(1)

pytest_plugins = ["tests.orchestration", "tests.scheduling"]


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
