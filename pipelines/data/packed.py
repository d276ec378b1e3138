"""Rows that are held as bytes: a table of short rows needs about its text, and not three times as much.

A row as a dictionary of texts has about 300 bytes besides its text; packed it has about 30.
"""

from __future__ import annotations

import marshal
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, overload

Row = dict[str, Any]
_PLAIN = {str, int, float, bool, type(None)}


class PackedRows(Sequence[Row]):
    """A sequence of rows. Every access makes a new dictionary, so a change of one does not change the sequence.

    Example:
        >>> rows = PackedRows([{"id": 0, "prompt": "1+1="}, {"id": 1, "prompt": "2+2="}])
        >>> rows[1]["prompt"], len(rows.chosen([1]))
        ('2+2=', 1)
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._bytes = bytearray()
        self._begins, self._ends = array("Q"), array("Q")
        self._names: list[tuple[str, ...]] = []
        self._numbers: dict[tuple[str, ...], int] = {}
        """Position of each tuple of names in `_names`; most tables have one."""
        self._unusual: dict[int, Row] = {}
        self.extend(rows)

    def extend(self, rows: Iterable[Row]) -> None:
        """Add rows at the end."""
        for row in rows:
            begin, end = self._written(row)
            self._begins.append(begin)
            self._ends.append(end)

    def chosen(self, places: Iterable[int]) -> PackedRows:
        """Return the rows at these places, in their order; the bytes are shared."""
        places = array("Q", places)
        begins = array("Q", (self._begins[place] for place in places))
        return self._view(begins, array("Q", (self._ends[place] for place in places)))

    def replaced(self, changes: Mapping[int, Row]) -> PackedRows:
        """Return the sequence with other rows at some places; the bytes of the remaining rows are shared."""
        if not changes:
            return self
        begins, ends = self._begins[:], self._ends[:]
        for place, row in changes.items():
            begins[place], ends[place] = self._written(row)
        return self._view(begins, ends)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> PackedRows: ...
    def __getitem__(self, place: int | slice) -> Row | PackedRows:
        if isinstance(place, slice):
            return self._view(self._begins[place], self._ends[place])
        return self._read(self._begins[place], self._ends[place])

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[Row]:
        for begin, end in zip(self._begins, self._ends, strict=True):
            yield self._read(begin, end)

    def _view(self, begins: array[int], ends: array[int]) -> PackedRows:
        view = PackedRows()
        view._bytes, view._names, view._numbers, view._unusual = self._bytes, self._names, self._numbers, self._unusual
        view._begins, view._ends = begins, ends
        return view

    def _written(self, row: Row) -> tuple[int, int]:
        """Write a row at the end of the bytes, and return its place."""
        begin, names = len(self._bytes), tuple(row)
        number = self._numbers.setdefault(names, len(self._numbers))
        if number == len(self._names):
            self._names.append(names)
        try:
            if not all(_is_plain(value) for value in row.values()):
                raise ValueError
            self._bytes += marshal.dumps((number, *row.values()))
        except (ValueError, RecursionError):  # a value of a class of its own, or nested too deeply
            self._unusual[begin] = dict(row)
            self._bytes += b"\0"
        return begin, len(self._bytes)

    def _read(self, begin: int, end: int) -> Row:
        if begin in self._unusual:
            return dict(self._unusual[begin])
        with memoryview(self._bytes) as every, every[begin:end] as mine:
            number, *values = marshal.loads(mine)
        return dict(zip(self._names[number], values, strict=True))


def _is_plain(value: Any) -> bool:
    """Return True if marshal stores the value as it is. It stores a number of NumPy as bytes."""
    kind = type(value)
    if kind is list:
        return all(_is_plain(inner) for inner in value)
    if kind is dict:
        return all(_is_plain(inner) for pair in value.items() for inner in pair)
    return kind in _PLAIN


class Chained(Sequence[Row]):
    """Sequences of rows one after the other, without a copy."""

    def __init__(self, *parts: Sequence[Row]) -> None:
        self._parts: list[Sequence[Row]] = []
        self._ends: list[int] = []
        for part in parts:
            self.append(part)

    def append(self, part: Sequence[Row]) -> None:
        """Add rows at the end; they must not change any more."""
        self._ends.append(len(self) + len(part))
        self._parts.append(part)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        i = range(len(self))[place]
        part = bisect_right(self._ends, i)
        return self._parts[part][i - (self._ends[part - 1] if part else 0)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self._parts)


def packed(rows: list[Row]) -> PackedRows:
    """Return the rows as packed ones, and empty the list: the two need not be in memory together."""
    rows.reverse()
    return PackedRows(rows.pop() for _ in range(len(rows)))


def empty_like(rows: Sequence[Row]) -> list[Row] | PackedRows:
    """Return a sequence without rows, packed if the rows are."""
    return PackedRows() if isinstance(rows, PackedRows) else []


def chosen(rows: Sequence[Row], places: Iterable[int]) -> Sequence[Row]:
    """Return the rows at these places; packed rows stay packed."""
    return rows.chosen(places) if isinstance(rows, PackedRows) else [rows[place] for place in places]


def replaced(rows: Sequence[Row], changes: Mapping[int, Row]) -> Sequence[Row]:
    """Return the rows with other ones at some places; packed rows stay packed."""
    if isinstance(rows, PackedRows):
        return rows.replaced(changes)
    return [changes.get(place, row) for place, row in enumerate(rows)] if changes else rows
