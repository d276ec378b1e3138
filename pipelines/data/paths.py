"""Read values of records by column name, dotted path or template."""

from __future__ import annotations

import math
import re
from typing import Any

from pipelines.data.files import Record

FIELD = re.compile(r"\{([^{}]+)\}")
"""A path in a template."""
ABSENT: Any = object()
"""The value that `value_at` returns for a record without the path."""


def paths_of(spec: str) -> list[str]:
    """Return the paths that the specification of a column reads: those in the braces of a template, else itself."""
    return FIELD.findall(spec) or [spec]


def value_at(record: Any, path: str) -> Any:
    """Return the value at a dotted path, else ABSENT. A name that contains dots is tried first; a number indexes a list.

    An index has one spelling, so that two different paths name different places: `m.01` and `m.-1` are no indices.
    """
    if isinstance(record, dict) and path in record:
        return record[path]
    head, _, rest = path.partition(".")
    if isinstance(record, dict) and head in record:
        inner = record[head]
    elif isinstance(record, list) and head.isdecimal() and str(int(head)) == head and int(head) < len(record):
        inner = record[int(head)]
    else:
        return ABSENT
    return value_at(inner, rest) if rest else inner


def is_there(record: Record, path: str) -> bool:
    """Return True if the record has a value at the path."""
    return value_at(record, path) is not ABSENT


def is_missing(value: Any) -> bool:
    """Return True for null, for no value at all, and for NaN: how tables write a missing value."""
    return value is None or value is ABSENT or (isinstance(value, float) and math.isnan(value))
