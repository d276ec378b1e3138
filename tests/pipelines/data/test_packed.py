"""Packed rows are equal to the rows they were made of, whatever these hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipelines.data.files import WrittenNumber
from pipelines.data.packed import Chained, PackedRows, chosen, packed, replaced

ROWS: list[dict[str, Any]] = [
    {"id": 0, "prompt": "1+1=", "completion": "2"},
    {"id": 1, "prompt": "né \ud83d\ude00 \ud800", "completion": [{"role": "user", "content": "x", "weight": 0.5}]},
    {"id": 2, "completion": None, "prompt": True},
    {"id": 3, "prompt": 1, "completion": 10**40, "weight": -math.inf},
    {"id": 4, "prompt": "", "completion": {"a": [1, 2.0, None]}, "x": "y"},
]


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else "deep"


def test_rows_of_any_content_come_back_as_they_were() -> None:
    rows = [*ROWS, {"id": 5, "prompt": np.float64(0.5), "completion": np.array([1])}, {"id": 6, "prompt": nested(900)}]
    number = WrittenNumber("0.1234567890123456789")
    number.text = "0.1234567890123456789"
    rows.append({"id": 7, "prompt": number, "completion": [number]})
    held = PackedRows(rows)
    assert len(held) == 8
    assert list(held) == rows
    assert [list(row) for row in held] == [list(row) for row in rows], "the order of the columns"
    assert [type(held[i]["prompt"]) for i in (0, 2, 3, 5, 7)] == [str, bool, int, np.float64, WrittenNumber]
    assert held[7]["completion"][0].text == "0.1234567890123456789"


def test_a_change_of_a_row_changes_nothing_else() -> None:
    held = PackedRows(ROWS)
    held[0]["prompt"] = "other"
    assert held[0]["prompt"] == "1+1="
    changed = held.replaced({1: {"id": 1, "prompt": "new"}})
    assert (changed[1], held[1]) == ({"id": 1, "prompt": "new"}, ROWS[1])
    assert list(changed[2:]) == ROWS[2:]


def test_chosen_rows_share_their_bytes_and_may_grow_on_their_own() -> None:
    held = PackedRows(ROWS)
    some = held.chosen([3, 0])
    some.extend([{"id": 9, "prompt": "more"}])
    held.extend([{"id": 8, "prompt": "else"}])
    assert list(some) == [ROWS[3], ROWS[0], {"id": 9, "prompt": "more"}]
    assert list(held) == [*ROWS, {"id": 8, "prompt": "else"}]
    assert list(held[-2:]) == [ROWS[4], {"id": 8, "prompt": "else"}]


def test_packing_empties_the_list() -> None:
    rows = list(ROWS)
    held = packed(rows)
    assert (rows, list(held)) == ([], ROWS)


def test_lists_and_packed_rows_are_chosen_and_replaced_alike() -> None:
    for rows in (ROWS, PackedRows(ROWS)):
        assert list(chosen(rows, [4, 1])) == [ROWS[4], ROWS[1]]
        assert list(replaced(rows, {0: ROWS[1]})) == [ROWS[1], *ROWS[1:]]
        assert replaced(rows, {}) is rows


def test_sequences_are_chained_without_a_copy() -> None:
    every = Chained(PackedRows(ROWS[:2]), [], ROWS[2:4])
    every.append(PackedRows(ROWS[4:]))
    assert (len(every), list(every), every[1:3]) == (5, ROWS, ROWS[1:3])
    assert [every[i] for i in (0, 1, 2, 4, -1, -5)] == [ROWS[i] for i in (0, 1, 2, 4, 4, 0)]
    assert (len(Chained()), list(Chained())) == (0, [])
    with pytest.raises(IndexError):
        every[5]
