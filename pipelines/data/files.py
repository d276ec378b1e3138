"""Records out of local files: .jsonl, .json (an array of objects), .csv and .parquet. Faults name file, line and what is wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.errors import DataError
from posttrain.text import nearest

Record = dict[str, Any]


def read_file(path: Path) -> list[Record]:
    """All records of a file, in order. Raises DataError where one cannot be read."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot read files that end in {path.suffix or 'nothing'!r}{nearest(path.suffix, READERS)}"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file. Local sources are paths from the project's root; check the spelling.")
    records = reader(path)
    if not records:
        raise DataError(f"{path}: has no records; give a source with at least one")
    return records


def _jsonl(path: Path) -> list[Record]:
    lines = enumerate(_text(path).split("\n"), start=1)
    return [_object(_parsed(line, path, number), f"{path}, line {number}") for number, line in lines if line.strip()]


def _parsed(line: str, path: Path, number: int) -> Any:
    shown = line if len(line) <= 60 else line[:57] + "..."
    try:
        return _loaded(line, f"{path}, line {number}")
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}, column {error.colno}: not JSON: {error.msg}. The line reads {shown!r}; correct or remove it."
        ) from None


def _loaded(text: str, where: str) -> Any:
    """The value of a JSON text. Raises DataError where it is JSON that cannot be held, JSONDecodeError where it is none."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            # half a surrogate pair can be spelt in JSON, and is no character
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise DataError(f"{where}: nested too deeply to be read; correct or remove it") from None
    except ValueError as error:
        raise DataError(f"{where}: cannot be held: {error}; correct or remove it") from None
    return value


def _json(path: Path) -> list[Record]:
    try:
        tree = _loaded(_text(path), str(path))
    except json.JSONDecodeError as error:
        hint = " A file with one object a line is .jsonl; rename it." if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}.{hint}") from None
    if not isinstance(tree, list):
        raise DataError(
            f"{path}: must hold an array of objects, and holds {_kind(tree)}; one object a line would be .jsonl"
        )
    return [_object(value, f"{path}, element {number}") for number, value in enumerate(tree)]


def _csv(path: Path) -> list[Record]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True), restkey=None, strict=True)
    records: list[Record] = []
    try:
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: has {_fields(record)}, the header has {len(reader.fieldnames or ())}"
                )
            records.append(record)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    return records


def _fields(record: Record) -> str:
    beyond = len(record.get(None, ()))  # type: ignore[call-overload]
    return f"{sum(v is not None for k, v in record.items() if k is not None) + beyond} fields"


def _parquet(path: Path) -> list[Record]:
    try:
        records: list[Record] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error
    return records


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object with named columns, and is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
