"""What the expectations look at: one frame per table with every fact about a row in a column of a plain type."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pandas as pd

from pipelines.data.tables import (
    ANSWERED,
    EQUATION,
    HELD_OUT,
    SCORES,
    TEXT,
    WEIGHT,
    Row,
    Table,
    is_messages,
    is_number,
    plain,
)
from posttrain.text import normalised

POSITION = "position"
"""Index of a row in its table: how results point at rows."""


class Lengths(Protocol):
    """Tokens of a prompt and of a completion, as the model is going to see them."""

    def prompt(self, text: Any) -> int: ...

    def completion(self, text: Any) -> int: ...


def structure_view(rows: Sequence[Row]) -> pd.DataFrame:
    """The columns as they came."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in names})


def types_view(table: Table, rows: Sequence[Row]) -> pd.DataFrame:
    """`{column}_type` of every text column; scores as they are."""
    columns: dict[str, Any] = {POSITION: range(len(rows)), "id": [row["id"] for row in rows]}
    for name in typed_columns(table):
        columns[f"{name}_type"] = pd.Series([kind(row[name]) for row in rows], dtype=object)
    for name in present_scores(rows):
        columns[name] = pd.Series([row[name] for row in rows], dtype="float64")
    return pd.DataFrame(columns)


def content_view(table: Table, rows: Sequence[Row], lengths: Lengths) -> pd.DataFrame:
    """Plain text, tokens, scores, weight, answer and a key of the whole row."""
    columns: dict[str, Any] = {POSITION: range(len(rows)), "id": [row["id"] for row in rows]}
    for name in TEXT[table]:
        count: Callable[[Any], int] = lengths.prompt if name == "prompt" else lengths.completion
        columns[name] = pd.Series([plain(row[name]) for row in rows], dtype=object)
        columns[f"{name}_tokens"] = pd.Series([count(_present(row[name])) for row in rows], dtype="int64")
    for name in present_scores(rows):
        columns[name] = pd.Series([row[name] for row in rows], dtype="float64")
    if is_number(table, WEIGHT) and WEIGHT in rows[0]:
        columns[WEIGHT] = pd.Series([row[WEIGHT] for row in rows], dtype="float64")
    if table in ANSWERED:
        columns["answer"] = pd.Series([plain(row["answer"]) for row in rows], dtype=object)
        if EQUATION in rows[0]:
            columns[EQUATION] = pd.Series([plain(row[EQUATION]) for row in rows], dtype=object)
    columns["row"] = pd.Series([_whole(row) for row in rows], dtype=object)
    return pd.DataFrame(columns)


def prompts_view(tables: Sequence[tuple[Table, Sequence[Row]]]) -> pd.DataFrame:
    """All prompts of all tables below each other, with what each is compared by."""
    every = [(table, row) for table, rows in tables for row in rows]
    return pd.DataFrame(
        {
            POSITION: range(len(every)),
            "table": pd.Series([table for table, _ in every], dtype=object),
            "id": pd.Series([row["id"] for _, row in every], dtype="int64"),
            "held_out": pd.Series([table in HELD_OUT for table, _ in every], dtype=bool),
            "prompt_key": pd.Series([prompt_key(row) for _, row in every], dtype=object),
        }
    )


def prompt_key(row: Row) -> str:
    text = plain(row["prompt"])
    return normalised(text) or text


def typed_columns(table: Table) -> tuple[str, ...]:
    return (*TEXT[table], "answer") if table in ANSWERED else TEXT[table]


def present_scores(rows: Sequence[Row]) -> list[str]:
    return [name for name in SCORES if rows and name in rows[0]]


def kind(value: Any) -> str:
    """text, messages, missing, or the JSON type that stands where text belongs."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return "text"
    if is_messages(value):
        return "messages"
    names = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _present(value: Any) -> Any:
    return "" if value is None else value


def _whole(row: Row) -> str:
    """Everything but where the row came from."""
    return json.dumps({k: v for k, v in row.items() if k not in ("id", "record")}, sort_keys=True, default=str)
