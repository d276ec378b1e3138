"""The inbox: a folder or an S3 prefix where new files of records arrive, one sub-folder per table.

    INBOX/preferences/monday.jsonl          waits to be taken in
    INBOX/quarantined/preferences/…         refused files, each with its reason next to it

POSTTRAIN_INBOX names it (default: `inbox` in the project). For S3, `s3://BUCKET/PREFIX` with the usual AWS_… variables.

A finished file is taken: no process has it open for writing, and it was not changed for POSTTRAIN_SETTLE_SECONDS (default 10). It is
claimed by a rename first, so a new file of the same name never meets the claimed one. Links, pipes and other entries that are no
files stay where they are and are reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pipelines.data.size_limit import refuse_size
from posttrain.errors import DataError

QUARANTINED = "quarantined"
_UNFINISHED = (".part", ".partial", ".tmp", ".crdownload")


@dataclass(frozen=True)
class Arrival:
    """One entry of the inbox.

    Attributes:
        name: path inside the inbox; what cannot be printed is escaped.
        place: path on the file system, or key in the store.
        state: changes whenever the content may have changed.
        left: why the entry stays where it is; nothing if it can be taken.
        attempts: processes that were killed while they read it.
    """

    name: str
    place: str
    state: tuple[object, ...] = ()
    left: str = ""
    attempts: int = 0

    @property
    def folder(self) -> str:
        """Return the sub-folder, which names the table; nothing for a file at the top."""
        return str(PurePosixPath(self.name).parent).removeprefix(".")

    @property
    def file(self) -> str:
        return PurePosixPath(self.name).name


class Inbox(Protocol):
    """The operations on an inbox. All raise DataError, naming the inbox, if it cannot be reached."""

    where: str

    def arrivals(self) -> list[Arrival]:
        """List every entry that waits, by name. Hidden files and unfinished ones (.part, .tmp …) do not count."""
        ...

    def exclusive(self) -> AbstractContextManager[bool]:
        """Keep other processes from taking files, if the inbox can do that; yield False if a different one is taking them."""
        ...

    def claim(self, arrival: Arrival) -> Arrival:
        """Make sure that no other process changes the file. Sets `left` if that is not possible any more."""
        ...

    def fetch(self, arrival: Arrival, target: Path) -> None:
        """Copy the file's bytes to `target`."""
        ...

    def unchanged(self, arrival: Arrival) -> bool:
        """Return True if the file is still the one that was claimed."""
        ...

    def remove(self, arrival: Arrival) -> None: ...

    def give_back(self, arrival: Arrival) -> None:
        """Undo the claim, so that the file waits again."""
        ...

    def quarantine(self, arrival: Arrival, reason: str) -> str:
        """Set the file aside with its reason in a text file. Return why it could not be moved, or nothing."""
        ...


def location(project: Path) -> str:
    return os.environ.get("POSTTRAIN_INBOX") or str(project / "inbox")


def waits(name: str) -> bool:
    """Return True if a path inside the inbox is neither hidden, nor quarantined, nor still being written."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and parts[0] != QUARANTINED and not name.endswith(_UNFINISHED)


def free_names(name: str) -> Iterator[str]:
    """Yield the name, then `-2`, `-3` … of it: every refused file is kept."""
    stem, dot, suffix = name.rpartition(".")
    return chain([name], (f"{stem}-{i}{dot}{suffix}" if dot else f"{name}-{i}" for i in count(2)))


def unusable(where: str, said: object) -> DataError:
    return DataError(
        f"the inbox {where} cannot be used: {said}. Nothing was lost; correct POSTTRAIN_INBOX or the rights"
        " of the folder, or wait until the store answers, and run again."
    )


class StoreInbox:
    """An S3 prefix. An object is written as a whole, so it is finished as soon as it is listed."""

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
        with self._reached():
            self._files.invalidate_cache()
            if not self._files.exists(self._base):
                return []
            found = self._files.find(self._base, detail=True)
        named = {str(PurePosixPath(place).relative_to(self._base)): place for place in sorted(found)}
        return [Arrival(name, place, _version(found[place])) for name, place in named.items() if waits(name)]

    def exclusive(self) -> AbstractContextManager[bool]:
        """A store has no locks: two projects with one prefix each take its objects."""
        return nullcontext(True)

    def claim(self, arrival: Arrival) -> Arrival:
        with self._reached():
            try:
                self._files.invalidate_cache()
                self._files.info(arrival.place)
            except PermissionError:
                return replace(
                    arrival, left="the key of this user may not read it; give it the right, or remove the object"
                )
            except FileNotFoundError:
                return replace(arrival, left="it has vanished")
        return arrival

    def fetch(self, arrival: Arrival, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._reached():
            refuse_size(self._files.size(arrival.place), arrival.file)
            self._files.get_file(arrival.place, str(target))

    def unchanged(self, arrival: Arrival) -> bool:
        with self._reached():
            self._files.invalidate_cache()
            return self._files.exists(arrival.place) and _version(self._files.info(arrival.place)) == arrival.state

    def remove(self, arrival: Arrival) -> None:
        with self._reached():
            self._files.rm_file(arrival.place)

    def give_back(self, arrival: Arrival) -> None: ...

    def quarantine(self, arrival: Arrival, reason: str) -> str:
        with self._reached():
            names = free_names(f"{QUARANTINED}/{arrival.name}")
            name = next(each for each in names if not self._files.exists(f"{self._base}/{each}"))
            target = f"{self._base}/{name}"
            try:
                self._files.cp_file(arrival.place, target)  # `copy` would take [ and * in a name for a pattern
            except PermissionError:
                return f"the key of this user may not copy it to {QUARANTINED}; give it the right, or remove the object"
            self._files.pipe_file(f"{target}.reason.txt", (reason + "\n").encode("utf-8", "backslashreplace"))
            self._files.rm_file(arrival.place)
        return ""

    @contextmanager
    def _reached(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except (OSError, BotoCoreError, ValueError) as error:
            said: Any = getattr(error, "strerror", None) or error
            raise unusable(self.where, said) from error


def _version(info: dict[str, Any]) -> tuple[object, ...]:
    return tuple(str(info.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime"))
