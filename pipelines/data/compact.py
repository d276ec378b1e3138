"""Small dictionaries for rows: a table of a million short rows would need more memory for its dictionaries than for its text.

A dictionary of six names has 272 bytes, with names that it shares with others 120 (CPython shares the names of the attributes of
objects of one class).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """Return an equal dictionary that shares its names with those of the same names in the same order; any change is still possible.

    Example:
        >>> compact({"id": 0, "prompt": "1+1="})
        {'id': 0, 'prompt': '1+1='}
    """
    names = tuple(row)
    holder = _holder(names)
    if holder is None:
        return row
    made = holder()
    for name in names:
        setattr(made, name, row[name])
    shared: dict[str, Any] = vars(made)
    return shared


@lru_cache(maxsize=256)  # a file may have other names in every row
def _holder(names: tuple[str, ...]) -> type | None:
    """Return the class for these names; None if one of them could not be an attribute."""
    if not all(name.isidentifier() and not name.startswith("_") for name in names):
        return None
    return type("Holder", (), {})
