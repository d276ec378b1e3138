"""Open folders into which other users may write: a link on the way, which could lead anywhere, is never followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_DIRECTORY
ASIDE = "not-a-folder"


@contextmanager
def opened(base: Path, path: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
    """Open the folder of `path`, which is below `base`, and yield its descriptor and the file's name.

    `make` makes missing folders; an entry that is in their place is renamed to NAME-1.not-a-folder first. Raises OSError if the folder is
    missing, or if it, or one above it, is a link.
    """
    *parts, file = path.split("/")
    held = os.open(base, _FLAGS)
    try:
        for part in parts:
            if make:
                _make(part, held)
            below = os.open(part, _FLAGS | os.O_NOFOLLOW, dir_fd=held)
            os.close(held)
            held = below
        yield held, file
    finally:
        os.close(held)


def exists(name: str, folder: int) -> bool:
    """Return True if an open folder has an entry of this name, which may be a link to nothing."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _make(name: str, folder: int) -> None:
    try:
        os.mkdir(name, dir_fd=folder)
    except FileExistsError:
        try:
            os.close(os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=folder))
        except NotADirectoryError:  # Linux reports a link in this way too
            shown = name.lstrip(".")
            free = next(each for each in (f"{shown}-{i}.{ASIDE}" for i in count(1)) if not exists(each, folder))
            os.rename(name, free, src_dir_fd=folder, dst_dir_fd=folder)
            os.mkdir(name, dir_fd=folder)
