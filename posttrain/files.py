"""Writes that a crash leaves whole: the old content or the new one, never a mixture.

Example:
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_atomic(Path(folder, "note.txt"), b"new")
    ...     Path(folder, "note.txt").read_text()
    'new'
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import DataError


def read_json(path: Path, remedy: str) -> Any:
    """Return the content of a JSON file that this project wrote.

    Raises DataError, which ends with the `remedy`, if the file is damaged, as after a power cut.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}) and is not used. {remedy}") from None


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted; none if there is no such folder.

    Raises OSError if a folder may not be listed. `Path.glob` passes over such a folder, as if it were empty.
    """

    def stop(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        return []
    return sorted(Path(top) / name for top, _, names in os.walk(folder, onerror=stop) for name in names)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the content of a file; its folder is made. Both are on disk when this returns. An error leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with named_in_errors(path), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk it would keep the space that the next try needs
        raise
    replace(partial, path)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Add the path to errors of the operating system without one: write(2) and fsync(2) report a full disk without a name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def partial_path(path: Path) -> Path:
    """Return the name under which this process writes `path` before it replaces it."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def replace(partial: Path, final: Path) -> None:
    """Give a complete file or folder its final name, replacing an existing one, and sync the parent folder."""
    if partial.is_dir() and final.is_dir():
        shutil.rmtree(final)  # rename(2) refuses to replace a folder that is not empty
    os.replace(partial, final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Write a file or a folder's list of names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
