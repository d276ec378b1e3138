"""Check that several files of one table have the same columns; otherwise rows of some would be empty."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.config.data_schema import TableSource
from pipelines.data.conversation_rows import Sourced
from pipelines.data.files import Record
from pipelines.data.formats import recognised
from pipelines.data.paths import is_there, paths_of
from pipelines.data.tables import SCORES, WEIGHT, is_number, required
from posttrain.errors import DataError

Part = tuple[str, Sequence[Record]]
"""The name of a file or hub source, and its records."""
_SHOWN = 4


def require_alike(kind: Sourced, source: TableSource, parts: Sequence[Part]) -> None:
    """Raise DataError if the files of a table differ in their format, or if one lacks a column that is mapped."""
    parts = [part for part in parts if part[1]]
    if len(parts) < 2:
        return
    if source.columns is not None:
        _require_mapped(kind, source.columns, parts)
    elif not (source.graded or source.preferred):
        _require_one_format(kind, parts)
        _require_numbers(kind, parts)


def _require_mapped(kind: Sourced, columns: dict[str, str], parts: Sequence[Part]) -> None:
    """Raise DataError if no record of a file has a column from which a necessary column of the table is read."""
    needed = {*required(kind), "messages"}
    own = {name: name for name in required(kind) if any(name in record for _, records in parts for record in records)}
    for name, records in parts:
        for column, spec in (({} if "messages" in columns else own) | columns).items():
            absent = [path for path in paths_of(spec) if not any(is_there(record, path) for record in records)]
            if (column in needed or is_number(kind, column)) and len(absent) == len(paths_of(spec)):
                raise DataError(
                    f"data.{kind}: {name} has no {absent[0]!r}, from which data.{kind}.columns reads {column}; its columns are"
                    f" {_columns(records)}. Other files of this table have it, so all rows of this one would have none. Rename the columns"
                    " in the file, or leave it out of the source."
                )


def _require_numbers(kind: Sourced, parts: Sequence[Part]) -> None:
    """Raise DataError if only some files have an optional column of numbers: a weight or a score of all rows or of none."""
    for column in (WEIGHT, *SCORES):
        having = [name for name, records in parts if any(column in record for record in records)]
        if is_number(kind, column) and 0 < len(having) < len(parts):
            lacking = next(name for name, _ in parts if name not in having)
            raise DataError(
                f"data.{kind}: {lacking} has no column {column!r}, which {having[0]} has. Give {column} to all rows of all files, or set"
                f" data.{kind}.columns without it."
            )


def _require_one_format(kind: Sourced, parts: Sequence[Part]) -> None:
    """Raise DataError if the files are of different formats, or if some are of none."""
    found = {name: recognised(kind, records, f"data.{kind} ({name})") for name, records in parts}
    formats = {name: known.name if known else "no known format" for name, known in found.items()}
    if len(set(formats.values())) == 1:
        return
    firsts: dict[str, str] = {}
    for name, known in formats.items():
        firsts.setdefault(known, name)
    listed = "; ".join(f"{name}: {known} ({_columns(dict(parts)[name])})" for known, name in [*firsts.items()][:_SHOWN])
    raise DataError(
        f"data.{kind}: its {len(parts)} files have different columns: {listed}. A table is read in one format, so rows of the others would"
        f" be empty. Give the files the same columns, or put some into a different folder and leave them out of data.{kind}.source."
    )


def _columns(records: Sequence[Record]) -> str:
    return ", ".join(name or repr(name) for name in sorted({str(name) for record in records for name in record}))
