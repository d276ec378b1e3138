r"""Recognise copies of texts in files, however often they were escaped or compressed.

A text is searched as it is, and again after text and file have lost the escapes of JSON (to any depth), Python's `repr` and HTML: then
`a \"b\"`, `a \\\"b\\\"` and `a &quot;b&quot;` are one text. Files of gzip, bzip2, xz, Zstandard and ZIP are unpacked, also inside each
other, and Parquet is decoded.

Example:
    >>> unescaped(r'{\\\"said\\\": \\\"caf\\\\u00e9 \\\\n\\\"}') == unescaped('{"said": "caf' + chr(233) + ' ' + chr(10) + '"}')
    True
"""

from __future__ import annotations

import gzip
import html
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.data.sources import CANONICAL, FORM
from posttrain.errors import DataError

SHORTEST = 4
"""Shorter texts are in many unrelated files, so that a file without longer ones could not be distinguished from others."""
LONG = 20
"""Characters from which a text inside a longer cell of a table is a copy: a template may surround it."""
MOST_BYTES = 2**30
"""A file that is larger when unpacked counts as one with the texts."""
DEEPEST = 5
"""Levels of compression inside each other; a deeper file counts as one with the texts."""
MOST_LEVELS = 8
"""Levels of HTML inside each other. Those of JSON are removed at once."""
_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([nrtbf]))?")
_BYTES = re.compile(r"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_CONTROL = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_PARQUET, _ZIP = b"PAR1", b"PK\x03\x04"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_TOKENS = {"prompt_ids", "response_ids"}
"""Columns of a table of rollouts, whose prompts are one text: a row's own text with its messages and template around it."""
_NO_TEXTS = ("role", "labelled", "annotator", "time")


class Texts:
    """The texts of a file's rows."""

    def __init__(self, records: Sequence[Any], others: Sequence[Any] = ()) -> None:
        """Take the texts of `records` that are in none of the `others`.

        Raises DataError if there is no text of four characters or more by which a copy could be recognised.
        """
        shared = set(strings(list(others)))
        found = {text for text in strings(list(records)) if len(text) >= SHORTEST and text not in shared}
        if not found:
            raise DataError(
                f"every text of the file is in other rows too, or is shorter than {SHORTEST} characters, so copies of its rows cannot be"
                " distinguished from theirs. Remove the file from data/raw/accepted, and run `dvc add data/raw/accepted` and `dvc repro`."
            )
        self._plain = found
        self._raw = sorted(text.encode("utf-8", "surrogatepass") for text in found)
        # the part of a text that no escape changes: a file without it need not be unescaped, which takes most of the time
        plain = {unescaped(text): _unchanged(text) for text in sorted(found)}
        self._unescaped = {text: part for text, part in plain.items() if len(text) >= SHORTEST}
        inside = (rf"(?<!\w){re.escape(text)}(?!\w)" for text in sorted(found) if len(text) >= LONG)
        self._inside = [re.compile(pattern) for pattern in inside]

    def in_file(self, path: Path) -> bool:
        """Return True if a file holds one of the texts."""
        return self.in_bytes(path.read_bytes())

    def in_bytes(self, data: bytes) -> bool:
        """Return True if the content of a file holds one of the texts, or cannot be shown to be free of them: it cannot be unpacked."""
        try:
            return any(map(self._in_part, _parts(data)))
        except DataError:
            return True

    def in_text(self, text: str) -> bool:
        """Return True if a text holds one of the texts."""
        return self._in_plain(text.encode("utf-8", "surrogatepass"))

    def in_row(self, row: Any) -> bool:
        """Return True if a cell of a canonical row is one of the texts, or holds it inside JSON or a template."""
        return any(map(self._is_cell, strings(row)))

    def _in_part(self, data: bytes) -> bool:
        return self._in_table(data) if data.startswith(_PARQUET) else self._in_plain(data)

    def _in_plain(self, data: bytes) -> bool:
        if any(text in data for text in self._raw):
            return True
        if b"\\" not in data and b"&" not in data:
            return False
        possible = [text for text, part in self._unescaped.items() if part in data]
        if not possible:
            return False
        shown = unescaped(data.decode("utf-8", "replace"))
        return any(text in shown for text in possible)

    def _in_table(self, data: bytes) -> bool:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            table, notes = file.read(), file.metadata.metadata or {}
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot be unpacked: {error}") from error
        rows = table.to_pylist()
        columns = set(table.column_names)
        if {"id", "prompt"} <= columns and not columns & _TOKENS:
            return any(map(self._is_cell, strings(rows)))
        cells = [*strings(rows), *(each.decode("utf-8", "replace") for each in notes.values())]
        return self.in_text("\0".join(cells))

    def _is_cell(self, cell: str) -> bool:
        """Return True for a cell of a canonical table that is one of the texts, or holds it inside JSON or a template.

        A short text inside a longer one is no copy: the prompt `12+155=` is not in the row `412+155=`.
        """
        if cell in self._plain or any(pattern.search(cell) for pattern in self._inside):
            return True
        return cell[:1] in "[{" and bool(cell) and any(text in self._plain for text in strings(_json(cell)))


def strings(value: Any) -> Iterator[str]:
    """Yield every string inside a JSON-like value, without roles of messages, and without the marks that labelling and intake add."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _NO_TEXTS and (key, inner) != (FORM, CANONICAL):
                yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def unescaped(text: str) -> str:
    """Return a text without the escapes of JSON, Python and HTML, and without any other backslash."""
    plain, before = text, ""
    for _ in range(MOST_LEVELS):
        if plain == before:
            break
        plain, before = _BYTES.sub(_decoded, _ESCAPE.sub(_character, html.unescape(plain))), plain
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unchanged(text: str) -> bytes:
    """Return the longest run of ASCII letters, digits and spaces that is no part of an escape; empty without one."""
    runs: list[str] = re.split(r"\\+\w*|&\w*|[^A-Za-z0-9 ]", text)
    return max(runs, key=len).encode()


def _character(found: re.Match[str]) -> str:
    digits = found[1] or found[2] or found[3]
    if digits:
        number = int(digits, 16)
        return chr(number) if number < 0x110000 else found[0]
    return _CONTROL[found[4]] if found[4] else ""


def _decoded(found: re.Match[str]) -> str:
    """Return the text of bytes of UTF-8 that Python's `repr` wrote one by one."""
    return found[0].encode("latin-1").decode("utf-8", "replace")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _parts(data: bytes, depth: int = 0) -> Iterator[bytes]:
    """Yield a file's content and everything packed in it. Raises DataError if that cannot be read."""
    yield data
    kind = next((name for begin, name in _COMPRESSED.items() if data.startswith(begin)), None)
    if kind is None and not data.startswith(_ZIP):
        return
    if depth == DEEPEST:
        raise DataError(f"is packed more than {DEEPEST} times")
    import pyarrow as pa

    try:
        inner = _unzipped(data) if kind is None else [_decompressed(data, kind)]
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        RuntimeError,
        pa.ArrowException,
    ) as error:
        raise DataError(f"cannot be unpacked: {error}") from error
    for part in inner:
        yield from _parts(part, depth + 1)


def _decompressed(data: bytes, kind: str) -> bytes:
    import pyarrow as pa

    from pipelines.data.compression import buffered

    stream: Any = io.BytesIO(data)
    openers: dict[str, Any] = {"gzip": gzip.open, **{each: partial(buffered, kind=each) for each in ("bz2", "xz")}}
    with openers[kind](stream) if kind in openers else pa.CompressedInputStream(stream, kind) as opened:
        found: bytes = opened.read(MOST_BYTES + 1)
    if len(found) > MOST_BYTES:
        raise DataError(f"is larger than {MOST_BYTES} bytes when unpacked")
    return found


def _unzipped(data: bytes) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(each.file_size for each in archive.infolist()) > MOST_BYTES:
            raise DataError(f"is larger than {MOST_BYTES} bytes when unpacked")
        return [archive.read(each) for each in archive.infolist()]
