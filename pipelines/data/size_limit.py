"""The largest file that the inbox takes, and the longest time for one."""

from __future__ import annotations

import os
import re
from typing import BinaryIO

from posttrain.errors import ConfigError, DataError

_CHUNK = 1 << 20


def limit_megabytes() -> int:
    """Return POSTTRAIN_INBOX_MB, the largest file of the inbox after decompression. Raises ConfigError if it is no number."""
    return _whole_number("POSTTRAIN_INBOX_MB", 1024, "megabytes")


def limit_seconds() -> int:
    """Return POSTTRAIN_INBOX_SECONDS, the longest time for reading and checking one file. Raises ConfigError if it is no number."""
    return _whole_number("POSTTRAIN_INBOX_SECONDS", 7200, "seconds")


def _whole_number(name: str, default: int, unit: str) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise ConfigError(f"{name} = {text[:40]!r}: must be a whole number of {unit}, at least 1.")
    return int(text)


def refuse_size(size: int, name: str) -> None:
    """Raise DataError if `size` bytes are more than the limit."""
    limit = limit_megabytes()
    if size > limit * 1_000_000:
        raise DataError(
            f"{name}: holds more than {limit} MB. Split it and put the parts into the inbox, or set POSTTRAIN_INBOX_MB if disk and"
            " memory have the room."
        )


def copy(source: BinaryIO, target: BinaryIO, name: str) -> None:
    """Copy a file. Raises DataError beyond the limit: a sparse file can be larger than the disk, and a growing one has no end."""
    size = 0
    while chunk := source.read(_CHUNK):
        size += len(chunk)
        refuse_size(size, name)
        target.write(chunk)
