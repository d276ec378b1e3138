"""The five canonical tables as Parquet files: columns, types and bytes that depend on the rows alone.

A value of the wrong type (a JSON boolean where text belongs) cannot stand in a typed column. It is kept beside it, in the
column `wrong_type`, so that validation can find, count and show it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.errors import DataError

Table = Literal["sft", "preferences", "preferences_heldout", "problems", "evaluation"]
Row = dict[str, Any]
TEXT: Mapping[Table, tuple[str, ...]] = {
    "sft": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "preferences_heldout": ("prompt", "chosen", "rejected"),
    "problems": ("prompt",),
    "evaluation": ("prompt",),
}
"""Columns that hold text: a string, or chat messages."""
ANSWERED: tuple[Table, ...] = ("problems", "evaluation")
"""Tables with a gold `answer`, a string."""
SCORES = ("chosen_score", "rejected_score")
TRAINING: tuple[Table, ...] = ("sft", "preferences", "problems")
HELD_OUT: tuple[Table, ...] = ("evaluation", "preferences_heldout")
EQUATION = "equation"
"""Optional in tables with an answer: arithmetic that the answer must be the value of."""
WEIGHT = "weight"
"""Optional in `sft`: how much each token of a row counts, a number that is not negative."""
FOLDER = Path("data/tables")
"""Where ingest writes them."""
WRONG_TYPE = "wrong_type"
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def required(table: Table) -> tuple[str, ...]:
    """Canonical columns that every row of the table has."""
    return (*TEXT[table], "answer") if table in ANSWERED else TEXT[table]


def is_messages(value: Any) -> bool:
    """Whether a value is chat messages: a list, not empty, of {role, content} with strings."""
    return isinstance(value, list) and bool(value) and all(_is_message(message) for message in value)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(v, str) for v in message.values())
    )


def is_text(value: Any) -> bool:
    return isinstance(value, str) or is_messages(value)


def plain(value: Any) -> str:
    """Text of a string or of chat messages, to compare and to show; nothing for a missing value."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return "\n".join(message["content"] for message in value) if is_messages(value) else json.dumps(value)


def write_rows(table: Table, rows: Sequence[Row], path: Path, extra: Sequence[str] = ()) -> None:
    """Write rows as Parquet: `id`, the canonical columns, then other columns by name. `extra` columns are strings, there or not."""
    typed = [_set_apart(table, row) for row in rows]
    columns = [pa.field(name, _type(table, name, typed)) for name in _order(table, typed, extra)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    pq.write_table(
        pa.Table.from_pylist(typed, schema=pa.schema(columns)),
        path,
        compression="zstd",
        version="2.6",
        store_schema=False,
    )


def read_rows(path: Path) -> list[Row]:
    """Rows as they were written, values of a wrong type back in their place. Raises DataError where the file cannot be read."""
    if not path.exists():
        raise DataError(f"no table {path}; make it with `dvc repro ingest`")
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: not a Parquet file that can be read ({error}); make it again with `dvc repro ingest`"
        ) from error
    for row in rows:
        row |= json.loads(row.pop(WRONG_TYPE, None) or "{}")
    return rows


def _set_apart(table: Table, row: Row) -> Row:
    """The row with values of a wrong type moved into `wrong_type`, as JSON."""
    wrong = {name: row[name] for name in TEXT[table] if row[name] is not None and not is_text(row[name])}
    if "answer" in row and row["answer"] is not None and not isinstance(row["answer"], str):
        wrong["answer"] = row["answer"]
    if not wrong:
        return row
    return row | dict.fromkeys(wrong) | {WRONG_TYPE: json.dumps(wrong, sort_keys=True, default=str)}


def _order(table: Table, rows: Sequence[Row], extra: Sequence[str]) -> list[str]:
    present = {name for row in rows for name in row} | set(extra)
    first = ["id", *required(table), *(name for name in SCORES if name in present)]
    return [*first, *sorted(present - set(first))]


def is_number(table: Table, name: str) -> bool:
    """Whether a column, if it is there, holds numbers."""
    return name in SCORES or (table == "sft" and name == WEIGHT)


def _type(table: Table, name: str, rows: Sequence[Row]) -> pa.DataType:
    if name in ("id", "record"):
        return pa.int64()
    if is_number(table, name):
        return pa.float64()
    return _MESSAGES if any(isinstance(row.get(name), list) for row in rows) else pa.string()
