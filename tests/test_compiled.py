"""Tests of the byte code that pytest's workers share."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.assertion import rewrite

from tests.compiled import rewrite_tests


def test_the_byte_code_of_a_test_shows_the_values_of_a_failed_assertion(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "tests" / "test_sum.py"
    path.parent.mkdir()
    path.write_text("def test():\n    two = 1 + 1\n    assert two == 3\n", encoding="utf-8")
    rewrite_tests(tmp_path, request.config)
    (cached,) = (path.parent / "__pycache__").iterdir()
    code = rewrite._read_pyc(path, cached)
    assert code is not None, "pytest reads it"
    names: dict[str, object] = {}
    exec(code, names)
    test = names["test"]
    assert callable(test)
    with pytest.raises(AssertionError, match="assert 2 == 3"):
        test()
