"""Records of data sets, and the canonical rows that are made of them."""

from __future__ import annotations

from typing import Any

from pipelines.config.data_schema import TableSource
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.pairs import Changes


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def rows(kind: Any, *records: dict[str, Any], changes: Changes | None = None, **fields: Any) -> list[dict[str, Any]]:
    made = canonical_rows(kind, TableSource(source="memory.jsonl", **fields), records, changes)
    return [{name: value for name, value in row.items() if name not in ("id", "record")} for row in made]
