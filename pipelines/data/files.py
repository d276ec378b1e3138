"""Read records from local files; errors name file, line and fault.

Formats: .jsonl and .ndjson, .json (an array of objects), .csv, .tsv and .parquet, each also compressed as .gz, .bz2, .xz or .zst.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.compact import compact
from pipelines.data.compression import kind_and_compression, opened
from pipelines.data.parquet import first_twice, parquet_records, refuse_wide
from posttrain.errors import DataError
from posttrain.text import nearest

Record = dict[str, Any]
LFS_POINTER = b"version https://git-lfs"
_BEGINNINGS = {
    codecs.BOM_UTF32_LE: "UTF-32 (save it as UTF-8)",
    codecs.BOM_UTF32_BE: "UTF-32 (save it as UTF-8)",
    codecs.BOM_UTF16_LE: "UTF-16 (save it as UTF-8)",
    codecs.BOM_UTF16_BE: "UTF-16 (save it as UTF-8)",
    b"\x1f\x8b": "compressed (name it .gz)",
    b"\x28\xb5\x2f\xfd": "compressed (name it .zst)",
    b"PK\x03\x04": "a ZIP archive (unpack it)",
    b"PAR1": "a Parquet file (name it .parquet)",
}
"""How files of other kinds begin."""


def read_file(path: Path) -> list[Record]:
    """Return all records of a file, in order. Raises DataError if one cannot be read."""
    kind, _ = kind_and_compression(path)
    reader = READERS.get(kind)
    if reader is None:
        raise DataError(f"{path}: cannot read files that end in {kind or 'nothing'!r}{nearest(kind, READERS)}")
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. Local sources are paths from the project's root; check the spelling."
            " The data of examples/*.yaml are not part of the project: docs/examples.md lists where to download them."
        )
    _refuse_pointer(path)
    records = reader(path)
    if not records:
        raise DataError(f"{path}: has no records; it must hold at least one")
    return records


def _refuse_pointer(path: Path) -> None:
    """Raise DataError for what git leaves in place of a file that git-lfs has not fetched; its lines could pass for a table."""
    with _reading(path), path.open("rb") as file:
        pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    if pointer:
        raise DataError(f"{path}: a git-lfs pointer instead of the data; type: git lfs pull")


def is_readable(path: Path) -> bool:
    """Return True if the name of the file ends as one that can be read."""
    return kind_and_compression(path)[0] in READERS


def _jsonl(path: Path) -> list[Record]:
    """Read one object per line. The file is never held as a whole: its records need several times its size."""
    records: list[Record] = []
    columns: set[str] = set()
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            value = _parsed(line, path, number)
            if number == 1 and isinstance(value, list):
                raise DataError(f"{path}, line 1: is an array of objects, which is .json; rename the file")
            record = _object(value, f"{path}, line {number}")
            columns.update(record)
            refuse_wide(len(columns), f"{path}, lines 1 to {number}")
            records.append(compact({sys.intern(name): value for name, value in record.items()}))
    return records


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file. Raises DataError if it cannot be read."""
    position = 0
    with _reading(path), opened(path) as file:
        for line in file:
            begin = len(codecs.BOM_UTF8) if not position and line.startswith(codecs.BOM_UTF8) else 0
            try:
                yield line[begin:].decode("utf-8").removesuffix("\n")
            except UnicodeDecodeError as error:
                raise _not_text(path, position + begin + error.start) from None
            position += len(line)


def _parsed(line: str, path: Path, number: int) -> Any:
    """Parse one line of JSON. Raises DataError with line and column if it is not JSON."""
    shown = line if len(line) <= 60 else line[:57] + "..."
    try:
        return _loaded(line, f"{path}, line {number}")
    except json.JSONDecodeError as error:
        if "\ufeff" in line:
            raise DataError(
                f"{path}, line {number}: holds a byte order mark (U+FEFF), as between files that were joined; remove it"
            ) from None
        spread = number == 1 and line.strip() in ("{", "[", "[{")
        hint = " If the file is one JSON document over several lines, name it .json." if spread else ""
        raise DataError(
            f"{path}, line {number}, column {error.colno}: not JSON: {error.msg}. The line reads {shown!r}; correct or remove it.{hint}"
        ) from None


def _loaded(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Raises DataError if the JSON cannot be represented, and JSONDecodeError if the text is not JSON.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object_of, parse_float=_number)
        if "\\ud" in text.lower():
            _refuse_half_characters(value, where)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise DataError(f"{where}: nested too deeply to be read; correct or remove it") from None
    except ValueError as error:
        raise DataError(f"{where}: cannot be held: {error}; correct or remove it") from None
    return value


class WrittenNumber(float):
    """A number that Python would write otherwise than the file does, such as 1.50 or one of many digits, with the text that spells it."""

    __slots__ = ("text",)
    text: str


def _number(text: str) -> float:
    """Return a number; if Python would write it otherwise, with its spelling."""
    plain = float(text)
    if repr(plain) == text:
        return plain
    number = WrittenNumber(text)
    number.text = text
    return number


def _refuse_half_characters(value: Any, where: str, column: str = "") -> None:
    """Raise DataError for half of a surrogate pair, which JSON can spell and which is no character."""
    if isinstance(value, str) and not _is_utf8(value):
        shown = value.encode("ascii", "backslashreplace").decode()[:60]
        place = f", column {column!r}" if column else ", the name of a column"
        raise DataError(
            f"{where}{place}: holds half of a character ({shown}), as a text that was cut by its UTF-16 length does; correct or remove it"
        )
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_half_characters(name, where, column)
            _refuse_half_characters(inner, where, column or name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _refuse_half_characters(inner, where if column else f"{where}, element {i}", column)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object_of(pairs: list[tuple[str, Any]]) -> Record:
    """Return a JSON object. Raises ValueError if a key occurs twice: one of the values would be lost."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"the key {first_twice(name for name, _ in pairs)!r} occurs twice in one object")
    return record


def _json(path: Path) -> list[Record]:
    """Read an array of objects."""
    try:
        tree = _loaded(_text(path), str(path))
    except json.JSONDecodeError as error:
        hint = " A file with one object a line is .jsonl; rename it." if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}.{hint}") from None
    if not isinstance(tree, list):
        raise DataError(
            f"{path}: must hold an array of objects, and holds {_kind(tree)}. Write records that are below a key as the array itself; a"
            " file with one object a line is .jsonl"
        )
    records = [_object(value, f"{path}, element {number}") for number, value in enumerate(tree)]
    refuse_wide(len({name for record in records for name in record}), str(path))
    return records


def _csv(path: Path) -> list[Record]:
    """Read a CSV file with a header. Raises DataError if a row has too many or too few fields."""
    return _delimited(path, ",")


def _tsv(path: Path) -> list[Record]:
    return _delimited(path, "\t")


def _delimited(path: Path, delimiter: str) -> list[Record]:
    # only the csv module knows where a record ends: str.splitlines() also splits at characters that a field may hold
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), restkey=None, strict=True, delimiter=delimiter)
    records: list[Record] = []
    try:
        names = reader.fieldnames or ()
        refuse_wide(len(names), f"{path}, line 1")
        twice = first_twice(names)
        if names and names[0].lower().startswith("sep="):
            raise DataError(
                f"{path}, line 1: {delimiter.join(names)!r} is a note to Excel, and no header; remove line 1"
            )
        other = next((mark for mark in (";", "\t", "|", ",") if len(names) == 1 and mark in names[0]), None)
        if other is not None:
            raise DataError(
                # pyrefly: ignore[bad-index]
                f"{path}, line 1: the header is one column, {names[0][:60]!r}; the file seems to be separated by {other!r} instead of"
                f" {delimiter!r}. Save it separated by {delimiter!r}{', or name it .tsv' if other == chr(9) else ''}."
            )
        if twice is not None:
            raise DataError(f"{path}, line 1: the header names column {twice!r} twice, so one would be lost; rename it")
        for record in reader:
            if None in record or None in record.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: has {_fields(record)}, the header has {len(names)}{_cause(names, record)}"
                )
            records.append(record)
    except csv.Error as error:
        unclosed = "; a field begins with a quote that nothing closes" if "unexpected end" in str(error) else ""
        raise DataError(
            f"{path}, record {len(records) + 1} (line {reader.reader.line_num}): not CSV: {error}{unclosed}. A field that holds a quote"
            ' is written in quotes, with the quote doubled: "say ""hi"""'
        ) from None
    return records


def _fields(record: Record) -> str:
    """Return the number of fields of a CSV row, in words."""
    return f"{len(_values(record))} fields"


def _values(record: Record) -> list[str]:
    """Return the fields of a CSV row, which may have more or fewer than the header."""
    named = [value for name, value in record.items() if name is not None and value is not None]
    return [*named, *record.get(None, ())]  # type: ignore[call-overload]


def _cause(names: Sequence[str], record: Record) -> str:
    """Return the likely cause of a wrong number of fields, with its remedy."""
    spaced = next((value for value in _values(record) if value[:1].isspace() and value.lstrip().startswith('"')), None)
    if spaced is not None:
        return (
            f". A field begins with a space and a quote ({spaced[:20]!r}): a quote holds a field together only if it is the field's first"
            " character. Remove the space before the quote."
        )
    if names[0].lstrip().startswith(("#", "//")) or len(names) == 1:
        return (
            f". Line 1 is taken for the header, and reads {names[0][:60]!r}. If it is a comment or a title, remove it."
        )
    return ""


def _parquet(path: Path) -> list[Record]:
    """Read a Parquet file."""
    return parquet_records(path, _content(path) if kind_and_compression(path)[1] else None)


def _text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises DataError if it cannot be read."""
    try:
        return _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, error.start) from None


def _not_text(path: Path, position: int) -> DataError:
    with path.open("rb") as file:
        head = file.read(4)
    kind = next((kind for begin, kind in _BEGINNINGS.items() if head.startswith(begin)), None)
    return DataError(
        f"{path}: not UTF-8 text at byte {position}; " + (f"it seems to be {kind}" if kind else "save it as UTF-8")
    )


def _content(path: Path) -> bytes:
    """Return the file's bytes, decompressed if its name says that they are compressed."""
    with _reading(path), opened(path) as file:
        return file.read()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise DataError if the file cannot be read or decompressed."""
    compressed = bool(kind_and_compression(path)[1])
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        if isinstance(error, OSError) and (error.filename or not compressed):
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        raise DataError(
            f"{path}: cannot be decompressed: {error}; it may be cut short, or compressed in a different way"
        ) from None


def _object(value: Any, where: str) -> Record:
    """Return the value if it is an object. Raises DataError otherwise."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object with named columns, and is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """Return the JSON name of a value's type."""
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
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
"""The reader for each file ending."""
