"""Small inputs in ../shared/cases, as people have them: each gives the right rows or ends in words that lead to them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cases(root: Path) -> Path:
    folder = (root / ".." / "shared" / "cases").resolve()
    if not folder.is_dir():
        pytest.skip(f"the small cases are not next to the project, at {folder}")
    return folder
