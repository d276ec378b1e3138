"""Read Parquet files and Arrow tables as records whose numbers and texts are as they were written."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.filled_structs import unfilled
from posttrain.errors import DataError

Convert = Callable[[Any], Any]
_NANOSECONDS = pa.time64("ns")
_LISTS = (
    pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view, pa.types.is_large_list_view,
)  # fmt: skip
_PLAIN = (
    pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_float64, pa.types.is_string, pa.types.is_large_string,
    pa.types.is_string_view,
)  # fmt: skip
"""Types whose values are JSON's own."""
MOST_COLUMNS = 1_000
"""All names of a file's records together. Thousands of columns would take minutes for a file of few rows."""


def parquet_records(path: Path, data: bytes | None = None) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file, or of its bytes `data`. Raises DataError if it cannot be read."""
    try:
        # one file is one table: names such as `year=2024` in its path are no columns
        with pq.ParquetFile(path if data is None else pa.BufferReader(data)) as file:
            refuse_wide(file.metadata.num_columns, str(path))
            table = file.read()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error
    return table_records(table, str(path))


def refuse_wide(columns: int, where: str) -> None:
    """Raise DataError if there are more than MOST_COLUMNS columns."""
    if columns > MOST_COLUMNS:
        raise DataError(
            f"{where}: has {columns:,} columns, and at most {MOST_COLUMNS:,} are read. Leave out those that are not needed; if the names"
            " are data, such as one column a user, write them as values."
        )


def first_twice(names: Iterable[str]) -> str | None:
    """Return the first name that occurs a second time, or None."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def table_records(table: pa.Table, where: str) -> list[dict[str, Any]]:
    """Return the rows of an Arrow table. Raises DataError if bytes are no UTF-8 text."""
    twice = first_twice(table.column_names)
    if twice is not None:
        raise DataError(f"{where}: has the column {twice!r} twice, so one would be lost; rename it")
    try:
        fine = [field.name for field in table.schema if _holds_nanoseconds(field.type)]
        records: list[dict[str, Any]] = table.to_pylist()
        list(table.schema.names)  # names may be undecodable, too
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: holds a name or a text that is not UTF-8 ({error.reason}); save it again as UTF-8"
        ) from None
    except (OverflowError, ValueError) as error:
        raise DataError(
            f"{where}: holds a date or time that Python cannot represent ({error}); save the column as text"
        ) from None
    for name in fine:
        for record, scalar in zip(records, table.column(name), strict=True):
            record[name] = _value(scalar)
    for field in table.schema:
        convert = _conversion(field.type)
        if convert is None:
            continue
        for number, record in enumerate(records):
            try:
                record[field.name] = convert(record[field.name])
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}, row {number}: column {field.name!r} holds bytes that are not UTF-8 text ({error.reason});"
                    " save the column as text, or leave it out"
                ) from None
            except ValueError as error:
                raise DataError(f"{where}, row {number}: column {field.name!r} holds {error}") from None
    for field in table.schema:
        if own := unfilled(field.name, field.type):
            for record in records:
                record[field.name] = own(record[field.name])
    return records


def _holds_nanoseconds(kind: pa.DataType) -> bool:
    """Return True if the type holds times of day in nanoseconds, which Python's own times cut to microseconds."""
    if kind == _NANOSECONDS:
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_nanoseconds(kind.storage_type)
    if pa.types.is_struct(kind):
        return any(_holds_nanoseconds(field.type) for field in kind)
    if pa.types.is_map(kind):
        return _holds_nanoseconds(kind.key_type) or _holds_nanoseconds(kind.item_type)
    inner = any(is_of(kind) for is_of in (*_LISTS, pa.types.is_dictionary, pa.types.is_run_end_encoded))
    return inner and _holds_nanoseconds(kind.value_type)


def _value(scalar: pa.Scalar) -> Any:
    """Return Python's value of a scalar, in which times of nanoseconds are text with all digits."""
    kind = scalar.type
    if not scalar.is_valid or not _holds_nanoseconds(kind):
        return scalar.as_py()
    if kind == _NANOSECONDS:
        seconds, rest = divmod(scalar.value, 1_000_000_000)
        micro, nano = divmod(rest, 1_000)
        shown = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{micro:06}"
        return f"{shown}{nano:03}" if nano else shown
    if pa.types.is_struct(kind):
        return {field.name: _value(scalar[i]) for i, field in enumerate(kind)}
    if pa.types.is_map(kind):
        return [(_value(pair[0]), _value(pair[1])) for pair in scalar.values]
    if any(is_list(kind) for is_list in _LISTS):
        return [_value(one) for one in scalar.values]
    return _value(scalar.value)  # of a dictionary, a run or an extension


def _conversion(kind: pa.DataType) -> Convert | None:
    """Return the function that makes a value of this type JSON-like, or None if it is already."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _conversion(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _written if isinstance(kind, pa.UuidType) else _conversion(kind.storage_type)
    if pa.types.is_map(kind):
        return _of_map(_conversion(kind.key_type), _conversion(kind.item_type))
    if pa.types.is_struct(kind):
        inner = {field.name: convert for field in kind if (convert := _conversion(field.type))}
        return _of_struct(inner) if inner else None
    if any(is_list(kind) for is_list in _LISTS):
        element = _conversion(kind.value_type)
        return (lambda value: None if value is None else [element(v) for v in value]) if element else None
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        narrow = np.float16 if pa.types.is_float16(kind) else np.float32
        # 0.1 in single precision is 0.10000000149011612 in double precision, which no file says
        return lambda value: None if value is None else float(str(narrow(value)))
    return None if kind == _NANOSECONDS or any(is_plain(kind) for is_plain in _PLAIN) else _written


def _of_map(key: Convert | None, item: Convert | None) -> Convert:
    """Return the conversion of a map's list of pairs to an object, whose names are texts as in JSON."""

    def name(value: Any) -> str:
        value = key(value) if key else value
        return value if isinstance(value, str) else json.dumps(value, sort_keys=True)

    def convert(value: Any) -> Any:
        if value is None:
            return None
        pairs = [(name(one), item(other) if item else other) for one, other in value]
        if (twice := first_twice(one for one, _ in pairs)) is not None:
            raise ValueError(f"the key {twice!r} twice in one map, so one of its values would be lost; correct the row")
        return dict(pairs)

    return convert


def _of_struct(inner: dict[str, Convert]) -> Convert:
    def convert(value: Any) -> Any:
        return None if value is None else value | {name: each(value[name]) for name, each in inner.items()}

    return convert


def _written(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return None if value is None else str(value)
