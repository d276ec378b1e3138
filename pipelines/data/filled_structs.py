"""Leave out the nulls by which Arrow fills up objects: a column's type has all keys of any of its objects.

A call of `weather` next to one of `add` would have `add`'s arguments, too, all null, and a tool's schema the properties of all tools.

Example:
    >>> kind = pa.list_(pa.struct([("arguments", pa.struct([("city", pa.string()), ("x", pa.int64())]))]))
    >>> convert = unfilled("tool_calls", kind)
    >>> convert([{"arguments": {"city": "Graz", "x": None}}])
    [{'arguments': {'city': 'Graz'}}]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

Convert = Callable[[Any], Any]
_WHOLE = ("tools", "functions", "arguments")
"""Names of columns and fields whose objects have different keys: the tools of a conversation, and the arguments of a call."""


def unfilled(name: str, kind: pa.DataType) -> Convert | None:
    """Return the function that leaves out such nulls from values of a column or field, None if the type can hold none."""
    if isinstance(kind, pa.BaseExtensionType):
        return unfilled(name, kind.storage_type)
    if pa.types.is_nested(kind) and hasattr(kind, "value_type"):  # a list
        element = unfilled(name, kind.value_type)
        return None if element is None else lambda value: value and [element(one) for one in value]
    if not pa.types.is_struct(kind):
        return None
    if name in _WHOLE:
        return without_nulls
    inner = {field.name: convert for field in kind if (convert := unfilled(field.name, field.type))}
    if not inner:
        return None
    return lambda value: value and value | {key: convert(value[key]) for key, convert in inner.items()}


def without_nulls(value: Any) -> Any:
    """Return a value without keys whose value is null, on every level."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value
