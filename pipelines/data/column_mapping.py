"""Map records of any shape to canonical rows: columns by name, dotted path or template; regular expressions; conversations."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from pipelines.config.data_schema import TableSource
from pipelines.data.compact import compact
from pipelines.data.conversation_rows import Sourced, chat_rows
from pipelines.data.files import Record, WrittenNumber
from pipelines.data.formats import Format, recognised, require_known, unused
from pipelines.data.mapping_checks import refuse_exclusion, refuse_leak
from pipelines.data.pairs import (
    Changes,
    check_scores,
    count_unused,
    graded_pairs,
    liked_records,
    number,
    preferred_pairs,
    score_names,
    thumbs_pairs,
)
from pipelines.data.paths import ABSENT, FIELD, is_missing, is_there, paths_of, value_at
from pipelines.data.tables import LABEL, RESERVED, SCORES, TEXT, TOOLS, WEIGHT, Row, is_number, is_text, required
from posttrain.data.messages import is_thumb, thumb
from posttrain.errors import ConfigError, DataError
from posttrain.text import nearest

NEAR = 0.85
"""Similarity from which the name of an unused column is asked about."""
_MESSAGES = "messages"
"""A canonical column that holds a whole conversation: it becomes prompt and completion."""


def canonical_rows(
    kind: Sourced,
    source: TableSource,
    records: Sequence[Record],
    changes: Changes | None = None,
    *,
    consume: bool = False,
) -> list[Row]:
    """Return rows with the table's canonical columns and `id`.

    `changes` counts omitted and added values. `consume` empties the list `records`: a table's records and rows need not be in memory
    together. Raises DataError naming column and row if a record cannot be mapped.
    """
    given, scores = records, score_names(source.columns, records)
    where = f"data.{kind} ({', '.join(source.names)})"
    changes = Counter() if changes is None else changes
    pairing = source.graded or source.preferred
    if source.columns is None and not pairing:
        records = _in_known_format(kind, records, where, changes)
    records, columns = _mapped(kind, source, records, where, changes)
    if pairing:
        rows = [_row(columns, record) for record in records]
        if source.graded:
            rows = graded_pairs(rows, records, source.graded, where, value_at, ABSENT, changes)
        elif source.preferred:
            rows = preferred_pairs(rows, records, source.preferred, where, value_at, ABSENT, changes)
        rows = [{"id": i, **row} for i, row in enumerate(rows[: source.rows])]
    else:
        records = list(records[: source.rows])
        if consume and isinstance(given, list):
            given.clear()
        rows = [compact({"id": i, **_row(columns, record)}) for i, record in enumerate(_consumed(records))]
    for name, pattern in (source.extract or {}).items():
        _extract(kind, rows, name, pattern, where)
    for row in rows:
        if "answer" in row:
            row["answer"] = _answer(row["answer"])
    rows = chat_rows(kind, rows, source, where, changes)
    _check_texts(kind, rows, where)
    check_scores(rows, where, scores, mapped=source.columns is not None)
    if kind == "sft":
        for row in rows:
            if WEIGHT in row:
                row[WEIGHT] = number(row[WEIGHT], f"{where}, row {row['id']}: {WEIGHT}")
    if kind == "labelled":
        for row in rows:
            row[LABEL] = thumb(row[LABEL], f"{where}, row {row['id']}: {LABEL}")
    return rows


def _mapped(
    kind: Sourced, source: TableSource, records: Sequence[Record], where: str, changes: Changes
) -> tuple[Sequence[Record], dict[str, Callable[[Record], Any]]]:
    """Return the records to be read and the functions that read their columns. Counts or refuses columns that are not read."""
    mapped = source.columns is not None
    good = _without_bad(source, records, where, changes) if kind == "sft" and mapped else records
    columns = _columns(kind, source, good, where)
    if mapped or source.graded or source.preferred:
        unread = [name for name in _unmapped(source, columns, records) if name != LABEL or good is records]
        refuse_exclusion(kind, f"data.{kind}.columns", unread, good, mapped=kind == "sft")
        count_unused(unread, changes)
    return good, columns


def _unmapped(source: TableSource, canonical: Iterable[str], records: Sequence[Record]) -> list[str]:
    """Return the names of the columns that no part of the mapping reads; columns that it does not name have their canonical names."""
    graded, preferred = source.graded, source.preferred
    paths = [path for spec in ({n: n for n in canonical} | (source.columns or {})).values() for path in paths_of(spec)]
    if graded is not None:
        paths += [*(graded.columns or ()), *([graded.answers] if graded.answers else []), graded.score]
    if preferred is not None:
        paths += [*preferred.columns, *preferred.answers.values()]
    read = {*paths, *(path.partition(".")[0] for path in paths)}
    return sorted({str(name) for record in records for name in record} - read)


def generated_rows(kind: Sourced, made: Sequence[Row], source: TableSource, where: str, changes: Changes) -> list[Row]:
    """Return an environment's rows with `id` and canonical values; further columns become text, as those of files do.

    Raises DataError if a value is neither text nor JSON, or a column holds no text.
    """
    known = {*TEXT[kind], *SCORES, _MESSAGES, "answer", WEIGHT, LABEL, TOOLS, "id"}
    rows = []
    made = _without_bad(source, made, where, changes) if kind == "sft" else made
    refuse_exclusion(kind, where, [name for name in {n: n for row in made for n in row} if name not in known], made)
    for i, row in enumerate(made):
        if taken := [name for name in row if name in RESERVED]:
            raise DataError(
                f"{where}, row {i}: this project writes its own column {taken[0]!r} into the tables; choose a different name"
            )
        try:
            more = {name: value if name in known else _written(value, strict=True) for name, value in row.items()}
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}, row {i}: {error}; give texts, numbers, and lists or mappings of them") from None
        rows.append({"id": i, **more, **({"answer": _answer(row["answer"])} if "answer" in row else {})})
    rows = chat_rows(kind, rows, source, where, changes)
    _check_texts(kind, rows, where)
    check_scores(rows, where, {})
    return rows


def _row(columns: dict[str, Callable[[Record], Any]], record: Record) -> Row:
    """Return the canonical columns of one record."""
    row = {name: read(record) for name, read in columns.items()}
    if not row.get(TOOLS):
        row.pop(TOOLS, None)
    return row


def _consumed(records: list[Record]) -> Iterator[Record]:
    """Yield the records in order and forget each."""
    records.reverse()
    while records:
        yield records.pop()


def _in_known_format(kind: Sourced, records: Sequence[Record], where: str, changes: Changes) -> Sequence[Record]:
    """Return the records with canonical columns, if their columns are of a known format."""
    found = recognised(kind, records, where)
    if found is None:
        require_known(kind, records, where)
        return records
    count_unused(unused(kind, found, records, where), changes)
    if found.name == "KTO" and kind != "labelled":
        if kind == "preferences":
            return thumbs_pairs(records, changes)
        up = [thumb(record.get(LABEL), f"{where}, row {i}: {LABEL}") for i, record in enumerate(records)]
        records = liked_records(records, up, where, changes)
    return [_converted(found, record, f"{where}, row {i}") for i, record in enumerate(records)]


def _without_bad(source: TableSource, records: Sequence[Record], where: str, changes: Changes) -> Sequence[Record]:
    """Return the records of good answers, if they have labels, true or false, that `columns` makes no part of the text."""
    spec = (source.columns or {}).get(LABEL, LABEL)
    if any(path == spec for name, one in (source.columns or {}).items() if name != LABEL for path in paths_of(one)):
        return records
    labels = [value_at(record, spec) for record in records]
    given = [label for label in labels if label is not ABSENT and label is not None]
    if not given or not all(map(is_thumb, given)):
        return records
    return liked_records(records, [not is_thumb(label) or thumb(label, where) for label in labels], where, changes)


def _converted(found: Format, record: Record, where: str) -> Record:
    try:
        return found.convert(record)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _columns(
    kind: Sourced, source: TableSource, records: Sequence[Record], where: str
) -> dict[str, Callable[[Record], Any]]:
    """Return how each column of the table is read from a record."""
    wanted = dict(source.columns or {})
    if "id" in wanted:
        raise ConfigError(
            f"data.{kind}.columns.id: `id` is the row's position in the source; keep the source's own under another name"
        )
    if taken := [name for name in wanted if name in RESERVED]:
        raise ConfigError(
            f"data.{kind}.columns.{taken[0]}: this project writes its own column {taken[0]!r} into the tables; choose a different name"
        )
    present = {name for record in records for name in record}
    whole = _MESSAGES in (wanted if source.columns is not None else present - {"prompt"})
    needed = _needed(kind, source, whole, present)
    if source.columns is None:
        optional = _optional(kind)
        names = [*needed, *(n for n in optional if n in present and is_number(kind, n))]
        _ask_about_near_names(kind, present, {*names}, optional, where)
        wanted = {name: name for name in [*names, *([TOOLS] if TOOLS in present else [])]}
    for name in wanted:
        known = get_close_matches(name.lower(), [*required(kind), *_optional(kind), TOOLS], n=1, cutoff=0.8)
        if known and name != known[0] and known[0] not in wanted:
            raise ConfigError(f"data.{kind}.columns.{name}: would not be used; did you mean {known[0]!r}?")
    read = {path for spec in wanted.values() for path in paths_of(spec)}
    for name in needed:
        if name not in wanted and name in present - read:
            wanted[name] = name
        elif name not in wanted:
            raise ConfigError(f"data.{kind}.columns: has no {name!r}; this table needs {', '.join(needed)}")
    refuse_leak(kind, source, wanted, records)
    numbers = (name for name in wanted if is_number(kind, name))
    paired = (*TEXT["sft"], *TEXT["preferences"]) if source.graded or source.preferred else ()
    as_it_is = {*TEXT[kind], *paired, _MESSAGES, "answer", LABEL, *numbers}
    return {name: _reader(name, spec, records, where, name in as_it_is) for name, spec in wanted.items()}


def _optional(kind: Sourced) -> tuple[str, ...]:
    """Return the optional columns of numbers that a table may have."""
    return {"sft": (WEIGHT,), "preferences": SCORES}.get(kind, ())


def _ask_about_near_names(
    kind: Sourced, present: set[str], used: set[str], optional: Sequence[str], where: str
) -> None:
    """Raise DataError for an unused column whose name is almost that of an optional one, such as score_chosen."""
    for name in sorted(present - used):
        for known in optional if not present & {*optional} else ():
            same_words = sorted(name.lower().split("_")) == sorted(known.split("_"))
            if same_words or SequenceMatcher(None, name.lower(), known).ratio() >= NEAR:
                raise DataError(
                    f"{where}: is the column {name!r} meant to be {known!r}? Without an answer it would not be used. If so, set"
                    f" data.{kind}.columns with {{{known}: {name}}} and the other columns; if not, set data.{kind}.columns without it."
                )


def _needed(kind: Sourced, source: TableSource, whole: bool, present: set[str]) -> list[str]:
    if whole and kind in ("sft", "labelled"):
        return [_MESSAGES, *([LABEL] if kind == "labelled" else [])]
    made = ("chosen", "rejected") if source.graded or source.preferred else ()
    needed = [name for name in required(kind) if name not in made]
    # pairs of whole conversations share their prompt
    prompt = "prompt" in source.columns if source.columns is not None else "prompt" in present
    needed = [name for name in needed if name != "prompt" or prompt or kind != "preferences" or made]
    # rewards may read no answer; a file without a mapping is of a known format here
    unanswered = kind == "problems" and "answer" not in {*present, *(source.columns or ())}
    return [name for name in needed if not (unanswered and name == "answer")]


def _reader(name: str, spec: str, records: Sequence[Record], where: str, as_it_is: bool) -> Callable[[Record], Any]:
    """Return the function that reads one column. Raises DataError if no record has the named path."""
    template = bool(FIELD.search(spec))
    for path in paths_of(spec):
        if not any(is_there(record, path) for record in records):
            there = sorted({str(key) for record in records for key in record})
            raise DataError(
                f"{where}: column {name!r} should come from {path!r}, which no record has{nearest(path, there)}."
                f" Correct data.*.columns.{name}; a prompt must not contain its answer."
            )

    def read(record: Record) -> Any:
        if template:
            parts = {path: value_at(record, path) for path in paths_of(spec)}
            # without a part, the row has no such value: validation counts it
            missing = any(map(is_missing, parts.values()))
            return None if missing else FIELD.sub(lambda field: _written(parts[field[1]]), spec)
        value = value_at(record, spec)
        return None if value is ABSENT else value if as_it_is else _written(value)

    return read


def _written(value: Any, strict: bool = False) -> str:
    """Return a value as text, for a template or an extra column; `strict` raises TypeError for values that JSON does not have."""
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, WrittenNumber):
        return value.text
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=None if strict else str)


def _answer(value: Any) -> Any:
    """Return a gold answer that is a number as text (51.0 is 51), and several accepted answers as a JSON list of texts."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, str | int | float) and not isinstance(v, bool) for v in value)
    ):
        return json.dumps([_answer(v) for v in value], ensure_ascii=False)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):  # how tables write a missing value
        return None
    if isinstance(value, WrittenNumber) and Decimal(value.text) != Decimal(value):
        return value.text
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(value)


def _extract(kind: Sourced, rows: list[Row], name: str, pattern: str, where: str) -> None:
    """Replace a column by the first group of a regular expression; a missing value stays. Raises DataError if a row does not match."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"data.{kind}.extract.{name} = {pattern!r}: not a regular expression: {error}") from None
    if not compiled.groups:
        raise ConfigError(f"data.{kind}.extract.{name} = {pattern!r}: has no group; put ( ) around what to keep")
    there = {column for row in rows for column in row}
    if rows and name not in there:
        raise ConfigError(f"data.{kind}.extract: the table has no column {name!r}{nearest(name, there)}")
    for row in rows:
        if is_missing(row.get(name)):  # validation counts it, unless the column is optional, such as tools
            continue
        several = name == "answer" and isinstance(row[name], list)
        kept = []
        for value in row[name] if several else [row[name]]:
            text = _answer(value) if name == "answer" else value
            found = compiled.search(text) if isinstance(text, str) else None
            if found is None or found[1] is None:
                raise DataError(
                    f"{where}, row {row['id']}: {name} {str(text)[-60:]!r} does not match extract {pattern!r}"
                )
            kept.append(found[1].strip() if name == "answer" else found[1])
        row[name] = kept if several else kept[0]


def _check_texts(kind: Sourced, rows: list[Row], where: str) -> None:
    """Raise DataError if a column holds no text at all, or mixes plain text and chat messages.

    Validation counts single values of a wrong type; a column without any text is the wrong column.
    """
    for name in TEXT[kind]:
        if not any(row[name] is None or is_text(row[name]) for row in rows):
            value = rows[0][name]
            raise DataError(
                f"{where}: {name} is never text; row 0 holds {value!r} ({type(value).__name__})."
                " Text is a string or a list of chat messages [{role, content}]; point `columns` at one, or make a single message a list."
            )
        kinds = {isinstance(row[name], str): row["id"] for row in reversed(rows) if is_text(row[name])}
        if len(kinds) == 2:
            raise DataError(
                f"{where}: {name} is plain text in row {kinds[True]} and chat messages in row {kinds[False]};"
                " make all rows of a table one of the two"
            )
