"""Records of any shape to canonical rows: columns by name, dotted path or template; regular expressions; graded answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.config.schema import GradedAnswers, TableSource
from pipelines.data.files import Record
from pipelines.data.tables import SCORES, TEXT, WEIGHT, Row, is_number, is_text, required
from posttrain.environments.parts import Kind
from posttrain.errors import ConfigError, DataError
from posttrain.text import nearest

_FIELD = re.compile(r"\{([^{}]+)\}")
_ABSENT: Any = object()


def canonical_rows(kind: Kind, source: TableSource, records: Sequence[Record]) -> list[Row]:
    """Rows with the table's canonical columns and `id`. Raises DataError naming column and row where that cannot be."""
    where = f"data.{kind} ({source.source})"
    columns = _columns(kind, source, records, where)
    rows = [{name: read(record) for name, read in columns.items()} for record in records]
    for row in rows:
        if "answer" in row:
            row["answer"] = _answer(row["answer"])
    if source.graded:
        rows = [
            pair | {"record": i}
            for i, row in enumerate(rows)
            for pair in _pairs(row, records[i], source.graded, f"{where}, row {i}")
        ]
        if not rows:
            raise DataError(
                f"{where}: no record holds a better and a worse answer among {', '.join(source.graded.columns)}"
            )
    rows = [{"id": i, **row} for i, row in enumerate(rows[: source.rows])]
    for name, pattern in (source.extract or {}).items():
        _extract(kind, rows, name, pattern, where)
    _check_texts(kind, rows, where)
    _check_scores(rows, where)
    if kind == "sft":
        for row in rows:
            if WEIGHT in row:
                row[WEIGHT] = _number(row[WEIGHT], f"{where}, row {row['id']}: {WEIGHT}")
    return rows


def _columns(
    kind: Kind, source: TableSource, records: Sequence[Record], where: str
) -> dict[str, Callable[[Record], Any]]:
    """How each column of the table is read from a record."""
    needed = [name for name in required(kind) if not (source.graded and name in ("chosen", "rejected"))]
    wanted = dict(source.columns or {})
    if "id" in wanted:
        raise ConfigError(
            f"data.{kind}.columns.id: `id` is the row's position in the source; keep the source's own under another name"
        )
    if source.columns is None:
        first = {name for record in records for name in record}
        wanted = {
            name: name for name in [*needed, *(n for n in (*SCORES, WEIGHT) if n in first and is_number(kind, n))]
        }
    for name in needed:
        if name not in wanted:
            raise ConfigError(f"data.{kind}.columns: has no {name!r}; this table needs {', '.join(needed)}")
    as_it_is = {*TEXT["sft"], *TEXT["preferences"], "answer", *(name for name in wanted if is_number(kind, name))}
    return {name: _reader(name, spec, records, where, name in as_it_is) for name, spec in wanted.items()}


def _reader(name: str, spec: str, records: Sequence[Record], where: str, as_it_is: bool) -> Callable[[Record], Any]:
    template = bool(_FIELD.search(spec))
    for path in _FIELD.findall(spec) if template else [spec]:
        if all(_at(record, path) is _ABSENT for record in records):
            there = sorted({str(key) for record in records for key in record})
            raise DataError(
                f"{where}: column {name!r} should come from {path!r}, which no record has{nearest(path, there)}."
                f" Say where it is, e.g. columns: {{{name}: {there[0] if there else 'COLUMN'}}}"
            )

    def read(record: Record) -> Any:
        if template:
            return _FIELD.sub(lambda field: _written(_at(record, field[1])), spec).strip()
        value = _at(record, spec)
        return None if value is _ABSENT else value if as_it_is else _written(value)

    return read


def _at(record: Any, path: str) -> Any:
    """The value at a dotted path; a name that holds dots itself comes first, a number counts into a list."""
    if isinstance(record, dict) and path in record:
        return record[path]
    head, _, rest = path.partition(".")
    if isinstance(record, dict) and head in record:
        inner = record[head]
    elif isinstance(record, list) and head.isdecimal() and int(head) < len(record):
        inner = record[int(head)]
    else:
        return _ABSENT
    return _at(inner, rest) if rest else inner


def _written(value: Any) -> str:
    """A value inside a template or of an extra column, as text."""
    if value is None or value is _ABSENT:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _answer(value: Any) -> Any:
    """A gold answer that is a number, as text; 51.0 is 51."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(value)


def _pairs(row: Row, record: Record, graded: GradedAnswers, where: str) -> list[Row]:
    """Every better answer of one record against every worse one."""
    answers = [
        (_at(record, f"{column}.{graded.text}"), _at(record, f"{column}.{graded.score}"), column)
        for column in graded.columns
    ]
    there = [
        (text, _number(score, f"{where}: {column}.{graded.score}"))
        for text, score, column in answers
        if text is not _ABSENT
    ]
    if not there:
        names = sorted(map(str, record))
        raise DataError(
            f"{where}: has none of the graded answers {graded.columns[0]}.{graded.text}{nearest(graded.columns[0], names)}"
        )
    return [
        row | {"chosen": better, "rejected": worse, "chosen_score": high, "rejected_score": low}
        for better, high in there
        for worse, low in there
        if high > low
    ]


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        shown = "missing" if value is _ABSENT else repr(value)
        raise DataError(f"{where} is {shown}; it must be a number or a boolean") from None
    if not math.isfinite(number):
        raise DataError(f"{where} is {number}; it must be finite. Correct or remove the record.")
    return number


def _extract(kind: Kind, rows: list[Row], name: str, pattern: str, where: str) -> None:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"data.{kind}.extract.{name} = {pattern!r}: not a regular expression: {error}") from None
    if not compiled.groups:
        raise ConfigError(f"data.{kind}.extract.{name} = {pattern!r}: has no group; put ( ) around what to keep")
    if rows and name not in rows[0]:
        raise ConfigError(f"data.{kind}.extract: the table has no column {name!r}{nearest(name, rows[0])}")
    for row in rows:
        found = compiled.search(row[name]) if isinstance(row[name], str) else None
        if found is None or found[1] is None:
            raise DataError(
                f"{where}, row {row['id']}: {name} {str(row[name])[-60:]!r} does not match extract {pattern!r}"
            )
        row[name] = found[1].strip()


def _check_texts(kind: Kind, rows: list[Row], where: str) -> None:
    """A few values of a wrong type are for validation to count; a column of nothing else is the wrong column."""
    for name in TEXT[kind]:
        if not any(row[name] is None or is_text(row[name]) for row in rows):
            value = rows[0][name]
            raise DataError(
                f"{where}: {name} is never text; row 0 holds {value!r} ({type(value).__name__})."
                " Text is a string or chat messages [{role, content}]; point `columns` at one."
            )
        kinds = {isinstance(row[name], str): row["id"] for row in reversed(rows) if is_text(row[name])}
        if len(kinds) == 2:
            raise DataError(
                f"{where}: {name} is plain text in row {kinds[True]} and chat messages in row {kinds[False]};"
                " make all rows of a table one of the two"
            )


def _check_scores(rows: list[Row], where: str) -> None:
    given = [name for name in SCORES if any(row.get(name) is not None for row in rows)]
    if len(given) == 1:
        raise DataError(f"{where}: has {given[0]} alone; pairs need both {' and '.join(SCORES)}, or neither")
    for row in rows:
        for name in SCORES:
            if given:
                row[name] = _number(row.get(name, _ABSENT), f"{where}, row {row['id']}: {name}")
            else:
                row.pop(name, None)
