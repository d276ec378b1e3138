"""Read and delete objects of DVC's cache and of every remote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.lineage.records import REMOVE, Cache
from pipelines.tracking.lockfile import read_dvc_config
from posttrain.errors import DataError
from posttrain.files import files_below

if TYPE_CHECKING:
    from dvc_data.hashfile.db import HashFileDB

_KEPT = "Nothing local was deleted; correct the remote and run again."
_SMALL_BYTES = 1 << 20
"""Objects of a remote up to this size are fetched once."""


class Objects:
    """The content of objects, from the cache, or from a remote if the cache has lost it, e.g. by `dvc gc`."""

    def __init__(self, project: Path, cache: Cache) -> None:
        self._project, self._cache = project, cache
        self._known: dict[str, bytes | None] = {}
        self._remotes: list[tuple[str, HashFileDB]] | None = None

    def read(self, md5: str) -> bytes | None:
        """Return an object's bytes, or None if neither cache nor remotes have it. Raises DataError if a remote cannot be read."""
        stored = self._cache.file(md5)
        if stored is not None:
            return stored.read_bytes()
        if md5 not in self._known:
            data = self._read_remotely(md5)
            if data is not None and len(data) > _SMALL_BYTES:
                return data
            self._known[md5] = data
        return self._known[md5]

    def names(self) -> set[str]:
        """Return the MD5 of every object of the cache and of the remotes. Raises DataError if a remote cannot be listed."""
        root = self._cache.folder / "files" / "md5"
        found = {path.parent.name + path.name for path in files_below(root)}
        for name, store in self._stores():
            with _reported(name):
                found |= {str(oid) for oid in store.all()}
        return found

    def begin(self, md5: str, length: int) -> bytes:
        """Return the first bytes of an object; none if neither cache nor remotes have it."""
        stored = self._cache.file(md5)
        if stored is not None:
            with stored.open("rb") as file:
                return file.read(length)
        return self._read_remotely(md5, length) or b""

    def _stores(self) -> list[tuple[str, HashFileDB]]:
        if self._remotes is None:
            self._remotes = list(_remotes(self._project))
        return self._remotes

    def _read_remotely(self, md5: str, length: int = -1) -> bytes | None:
        for name, store in self._stores():
            with _reported(name):
                if store.exists(md5):
                    with store.fs.open(store.oid_to_path(md5), "rb") as file:
                        return bytes(file.read(length))
        return None

    def listed(self, md5: str) -> list[str]:
        """Return the MD5 of the files of a folder; none if its listing is lost everywhere."""
        return list(self.entries(md5).values())

    def entries(self, md5: str) -> dict[str, str]:
        """Return the files of a folder by name, with their MD5; none if its listing is lost everywhere."""
        data = self.read(md5)
        if data is None:
            return {}
        try:
            return {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(data)}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{md5} is damaged: {error}. {REMOVE}") from error


def erase_remotely(project: Path, objects: Sequence[str]) -> list[str]:
    """Delete objects from every remote of DVC, and return the remotes' names. Raises DataError if one cannot be changed."""
    names = []
    for name, store in _remotes(project):
        with _reported(name):
            for md5 in objects:
                if store.exists(md5):
                    store.delete(md5)
        names.append(name)
    return names


def _remotes(project: Path) -> Iterator[tuple[str, HashFileDB]]:
    """Yield the name and store of every remote. Without remotes, DVC is not imported: it takes longer than the rest."""
    if not any(section.strip("'").startswith("remote ") for section in read_dvc_config(project).sections()):
        return
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        for name in sorted(repo.config["remote"]):
            with _reported(name):
                store = repo.cloud.get_remote_odb(name, "forget")
            yield name, store


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Report an error of a remote in words."""
    from botocore.exceptions import BotoCoreError, ClientError
    from dvc.exceptions import DvcException

    try:
        yield
    except (DvcException, OSError, ImportError, BotoCoreError, ClientError) as error:
        raise DataError(f"the remote {name} may still hold the rows: {error}. {_KEPT}") from error
