"""What every test may need: paths, and one thread, on which small models run fastest and give the same numbers everywhere."""

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
    """The project's root."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data(root: Path) -> Path:
    """Public data sets in their original form, which live beside the checkout."""
    folder = (root / ".." / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder
