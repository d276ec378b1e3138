"""Every fault in docs/reliability.md and every attack in docs/security.md names tests that exist, with their tier."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

NAMED = re.compile(r"`(?:(tests/[\w/]+\.py))?(?:::(test_\w+))?`( \(slow\))?")
SLOW = re.compile(r"pytest\.mark\.(?:slow|vllm)|\bREAL\b")


def rows(page: Path, heading: str) -> Iterator[tuple[str, str]]:
    """Yield the first and the last cell of each row of the tables whose last column has this heading."""
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|"):
            inside = False
        elif cells[-1] == heading:
            inside = True
        elif inside and not line.startswith("|---"):
            yield cells[0], cells[-1]


@cache
def defined_tests(path: Path) -> dict[str, bool]:
    """Return the file's tests, each with True if every run of it is slow."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    marks = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node.targets[0])
    ]
    everywhere = bool(SLOW.search(" ".join(marks)))
    functions = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    return {f.name: everywhere or any(SLOW.match(ast.unparse(mark)) for mark in f.decorator_list) for f in functions}


def named(cell: str) -> Iterator[tuple[str, str, bool]]:
    """Yield path, name and slowness of each test in a cell; a name without a path belongs to the path before it."""
    path = ""
    for match in NAMED.finditer(cell):
        path = match[1] or path
        yield path, match[2] or "", bool(match[3])


def test_every_fault_has_its_test(root: Path) -> None:
    faults = list(rows(root / "docs" / "reliability.md", "shown by"))
    assert len(faults) > 100
    for fault, cell in faults:
        found = list(named(cell))
        assert found, f"{fault}: names no test"
        for path, name, slow in found:
            known = defined_tests(root / path)
            assert name in known, f"{fault}: {path} has no {name}"
            assert slow == known[name], f"{fault}: {name} is {'slow' if known[name] else 'not slow'}"


def test_every_attack_has_a_file_of_tests(root: Path) -> None:
    attacks = list(rows(root / "docs" / "security.md", "test"))
    assert len(attacks) > 20
    for attack, cell in attacks:
        found = list(named(cell))
        assert found, f"{attack}: names no test"
        for path, name, _ in found:
            assert defined_tests(root / path), f"{attack}: {path} has no tests"
            assert not name or name in defined_tests(root / path)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("`tests/a.py::test_x`, `::test_y` (slow)", [("tests/a.py", "test_x", False), ("tests/a.py", "test_y", True)]),
        ("`tests/a.py`, a sentence", [("tests/a.py", "", False)]),
        ("same", []),
    ],
)
def test_cells_are_read_as_they_are_written(cell: str, expected: list[tuple[str, str, bool]]) -> None:
    assert list(named(cell)) == expected
