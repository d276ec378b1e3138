"""Refuse a file that would fill the memory. Its size after decompression is measured, without holding it.

A Parquet file of 862 bytes can hold 8 GB, since it stores equal values once; a .gz file can expand a thousand times.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.compression import OPENERS, kind_and_compression
from pipelines.data.parquet import refuse_wide
from pipelines.data.size_limit import limit_megabytes
from posttrain.errors import DataError

MOST_ROWS = 5_000_000
SPARE_BYTES = 4_000_000_000
"""Address space that reading any file may add: buffers, and libraries that are loaded on first use."""
BYTES_PER_BYTE = 8
"""Memory per byte of the file; usual rows need about four."""
_CHUNK = 1 << 20


def refuse_too_large(path: Path) -> None:
    """Raise DataError if the file holds more than POSTTRAIN_INBOX_MB megabytes or MOST_ROWS rows."""
    limit = limit_megabytes() * 1_000_000
    kind, compression = kind_and_compression(path)
    try:
        size = rows = 0
        for more, records in _parts(path, kind, compression, limit):
            size, rows = size + more, rows + records
            if size > limit or rows > MOST_ROWS:
                raise DataError(_words(path, limit))
    except (OSError, EOFError, ValueError, lzma.LZMAError, pa.ArrowException):
        return  # a damaged file: its reader names the fault


def refuse_too_many(rows: int, path: Path) -> None:
    """Raise DataError for more than MOST_ROWS rows. Only reading tells how many a text file has."""
    if rows > MOST_ROWS:
        raise DataError(f"{path}: has {rows:,} rows, and the inbox takes files of up to {MOST_ROWS:,}. Split it.")


def memory_for(path: Path) -> int:
    """Return the bytes of memory that reading a file may add: a list of empty lists needs twenty times its size."""
    _, compression = kind_and_compression(path)
    size = limit_megabytes() * 1_000_000 if compression or path.suffix == ".parquet" else path.stat().st_size
    return SPARE_BYTES + BYTES_PER_BYTE * size


def _words(path: Path, limit: int) -> str:
    return (
        f"{path}: holds more than {limit // 1_000_000} MB or {MOST_ROWS:,} rows after decompression, and reading it could fill the"
        " memory. Split it and put the parts into the inbox, or set POSTTRAIN_INBOX_MB if the machine has the memory (a file needs"
        " about four times its size)."
    )


def _parts(path: Path, kind: str, compression: str, limit: int) -> Iterator[tuple[int, int]]:
    """Yield bytes and rows of each part of the file."""
    if kind == ".parquet":
        if compression:
            yield from ((each, 0) for each in _decompressed(path, compression))
            return
        yield from _parquet(path, limit)
    elif compression:
        yield from ((each, 0) for each in _decompressed(path, compression))
    else:
        yield path.stat().st_size, 0


def _decompressed(path: Path, compression: str) -> Iterator[int]:
    with OPENERS[compression](path) as file:
        while chunk := file.read(_CHUNK):
            yield len(chunk)


def _parquet(path: Path, limit: int) -> Iterator[tuple[int, int]]:
    """Yield first the sizes that the file declares, then those of its values, a few rows at a time."""
    with pq.ParquetFile(path) as file:
        refuse_wide(file.metadata.num_columns, str(path))
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        declared = sum(group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns))
        yield (declared if declared > limit else 0), file.metadata.num_rows
        for batch in file.iter_batches(batch_size=256):
            yield batch.nbytes, 0
