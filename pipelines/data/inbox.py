"""The inbox: a folder or an S3 prefix where new files of records arrive, one sub-folder per table.

    INBOX/preferences/monday.jsonl          waits to be taken in
    INBOX/quarantined/preferences/…         what was refused, each with its reason beside it

POSTTRAIN_INBOX names it (default: `inbox` in the project). For S3, `s3://BUCKET/PREFIX` with the usual AWS_… variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain.errors import DataError

QUARANTINED = "quarantined"
_UNFINISHED = (".part", ".partial", ".tmp", ".crdownload")


@dataclass(frozen=True)
class Arrival:
    """One file of the inbox. `name` is its path inside the inbox, `place` its path on the file system."""

    name: str
    place: str

    @property
    def folder(self) -> str:
        """The sub-folder, which names the table; nothing for a file at the top."""
        return str(PurePosixPath(self.name).parent).removeprefix(".")

    @property
    def file(self) -> str:
        return PurePosixPath(self.name).name


def location(project: Path) -> str:
    return os.environ.get("POSTTRAIN_INBOX") or str(project / "inbox")


class Inbox:
    """Raises DataError, naming the inbox, where it cannot be reached."""

    def __init__(self, where: str) -> None:
        import fsspec

        self.where = where
        try:
            with self._reached():
                self._files, self._base = fsspec.core.url_to_fs(where)
        except ImportError as error:
            raise DataError(
                f"the inbox {where}: {error}. Folders and s3:// work as they are; other stores need their package."
            ) from error

    def arrivals(self) -> list[Arrival]:
        """Every file that waits, by name. Hidden files and those still being written (.part, .tmp …) do not count."""
        with self._reached():
            self._files.invalidate_cache()
            if not self._files.exists(self._base):
                return []
            places = self._files.find(self._base)
        names = {place: str(PurePosixPath(place).relative_to(self._base)) for place in sorted(places)}
        return [Arrival(name, place) for place, name in names.items() if _waits(name)]

    def fetch(self, arrival: Arrival, target: Path) -> None:
        """Copy the file's bytes to `target`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._reached():
            self._files.get_file(arrival.place, str(target))

    def remove(self, arrival: Arrival) -> None:
        with self._reached():
            self._files.rm_file(arrival.place)

    def quarantine(self, arrival: Arrival, reason: str) -> str:
        """Set the file aside with its reason in a text file; returns its new path inside the inbox."""
        with self._reached():
            name = self._free(f"{QUARANTINED}/{arrival.name}")
            target = f"{self._base}/{name}"
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(f"{target}.reason.txt", (reason + "\n").encode())
            self._files.cp_file(arrival.place, target)  # `copy` would take [ and * in a name for a pattern
            self._files.rm_file(arrival.place)
        return name

    def _free(self, name: str) -> str:
        """The name, or the first of `-2`, `-3` … of it that nothing holds: every refused file is kept."""
        stem, dot, suffix = name.rpartition(".")
        names = chain([name], (f"{stem}-{i}{dot}{suffix}" if dot else f"{name}-{i}" for i in count(2)))
        return next(each for each in names if not self._files.exists(f"{self._base}/{each}"))

    @contextmanager
    def _reached(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except (OSError, BotoCoreError, ValueError) as error:
            said: Any = getattr(error, "strerror", None) or error
            raise DataError(
                f"the inbox {self.where} cannot be used: {said}. Nothing was lost; correct POSTTRAIN_INBOX or the rights"
                " of the folder, or wait until the store answers, and run again."
            ) from error


def _waits(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and parts[0] != QUARANTINED and not name.endswith(_UNFINISHED)
