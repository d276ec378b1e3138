"""Open compressed files. Several streams in one file are read as one, and anything else behind a stream is an error.

Python's own bz2 and lzma files end without an error at the first stream that is damaged, so its rows would be missing.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa

_CHUNK = 1 << 16


class Streams(io.RawIOBase):
    """Decompress a file of one or more streams.

    Args:
        start: makes the decompressor of a stream, `bz2.BZ2Decompressor` or `lzma.LZMADecompressor`.
        padding: bytes that may follow a stream; the format of .xz allows zeros.
    """

    def __init__(
        self, file: BinaryIO, start: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], padding: bytes = b""
    ) -> None:
        self._file, self._start, self._padding = file, start, padding
        self._stream = start()

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer and return the number of its bytes, 0 at the end.

        Raises:
            EOFError: the last stream is cut short.
            OSError: a stream is damaged, or what follows it is none (lzma.LZMAError for .xz).
        """
        while True:
            if self._stream.eof:
                left = self._stream.unused_data.lstrip(self._padding)
                while not left and (chunk := self._file.read(_CHUNK)):
                    left = chunk.lstrip(self._padding)
                if not left:
                    return 0
                self._stream = self._start()
                data = self._stream.decompress(left, len(buffer))
            elif self._stream.needs_input:
                chunk = self._file.read(_CHUNK)
                if not chunk:
                    raise EOFError("the file ends before the end of its last stream")
                data = self._stream.decompress(chunk, len(buffer))
            else:
                data = self._stream.decompress(b"", len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def buffered(file: BinaryIO, kind: Literal["bz2", "xz"]) -> BufferedIOBase:
    """Return the decompressed bytes of an open file of streams."""
    streams = Streams(file, bz2.BZ2Decompressor) if kind == "bz2" else Streams(file, lzma.LZMADecompressor, b"\0")
    return io.BufferedReader(streams, _CHUNK)


def kind_and_compression(path: Path) -> tuple[str, str]:
    """Return the format's suffix and the compression's, e.g. (".jsonl", ".gz"); the second may be empty."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in OPENERS:
        return suffixes[-2], suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


def opened(path: Path) -> BufferedIOBase:
    """Open a file to read its bytes, decompressed if its name ends like that of a compressed one."""
    return OPENERS.get(kind_and_compression(path)[1], _plain)(path)


def _plain(path: Path) -> BufferedIOBase:
    return path.open("rb")


def _bzip2(path: Path) -> BufferedIOBase:
    return buffered(path.open("rb"), "bz2")


def _xz(path: Path) -> BufferedIOBase:
    return buffered(path.open("rb"), "xz")


def _zstandard(path: Path) -> BufferedIOBase:
    return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))


OPENERS: dict[str, Callable[[Path], BufferedIOBase]] = {
    ".gz": gzip.GzipFile,
    ".bz2": _bzip2,
    ".xz": _xz,
    ".zst": _zstandard,
}
