"""Objects of the S3 store on disk: files named by chance, and an SQLite index of buckets, keys and uploads.

A file is on disk before the index names it, and is never changed. So after a crash every key has its old content or its new one, and
files without a name are deleted at the next start.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from posttrain.errors import OrchestrationError
from posttrain.files import named_in_errors, sync

SCHEMA = """
CREATE TABLE IF NOT EXISTS buckets (name TEXT PRIMARY KEY, created TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS objects (
    bucket TEXT, key TEXT, file TEXT NOT NULL, size INTEGER NOT NULL, etag TEXT NOT NULL, modified TEXT NOT NULL, headers TEXT NOT NULL,
    PRIMARY KEY (bucket, key));
CREATE TABLE IF NOT EXISTS uploads (id TEXT PRIMARY KEY, bucket TEXT, key TEXT, headers TEXT NOT NULL, began TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS parts (
    upload TEXT, number INTEGER, file TEXT NOT NULL, size INTEGER NOT NULL, etag TEXT NOT NULL, PRIMARY KEY (upload, number));
"""
CHUNK = 1 << 20
BUSY_SECONDS = 60.0


@dataclass(frozen=True)
class Stored:
    """Content on disk: its file in the folder of objects, its bytes and its MD5."""

    file: str
    size: int
    etag: str


@dataclass(frozen=True)
class Entry:
    """One object. `headers` is JSON with the content type and the user's metadata, `modified` an ISO time in UTC."""

    key: str
    content: Stored
    modified: str
    headers: str


class ObjectStore:
    """The objects below one folder. All methods are thread-safe; one process at a time uses a folder.

    Raises:
        OrchestrationError: the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = folder / "objects"
        self.objects.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        try:
            with self._index() as index:
                index.executescript(SCHEMA)
                (found,) = index.execute("PRAGMA quick_check").fetchone()
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
        except sqlite3.DatabaseError as error:
            raise OrchestrationError(
                f"the index of the S3 store, {folder / 'index.db'}, is damaged ({error}), and nothing was changed. Restore the folder from"
                f" a back-up. Without one, move {folder} away: DVC pushes weights again, MLflow's artifacts are lost."
            ) from None
        self._reconcile()

    def create_bucket(self, bucket: str, now: str) -> None:
        """Create a bucket, or leave an existing one as it is."""
        with self._index() as index:
            index.execute("INSERT OR IGNORE INTO buckets VALUES (?, ?)", (bucket, now))

    def delete_bucket(self, bucket: str) -> bool:
        """Delete an empty bucket; return False if it holds objects."""
        with self._index() as index:
            if index.execute("SELECT 1 FROM objects WHERE bucket = ? LIMIT 1", (bucket,)).fetchone():
                return False
            index.execute("DELETE FROM buckets WHERE name = ?", (bucket,))
        return True

    def buckets(self) -> list[tuple[str, str]]:
        """Return the buckets' names and times, sorted."""
        with self._index() as index:
            return list(index.execute("SELECT name, created FROM buckets ORDER BY name"))

    def receive(self, body: Iterable[bytes], sha256: str = "") -> Stored | None:
        """Write content to disk that no key names yet; return None if it has not the SHA-256 that is given."""
        name, size, md5, digest = secrets.token_hex(16), 0, hashlib.md5(usedforsecurity=False), hashlib.sha256()
        path = self.objects / name
        try:
            with named_in_errors(path), path.open("xb") as file:
                for chunk in body:
                    file.write(chunk)
                    md5.update(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                file.flush()
                os.fsync(file.fileno())
            if sha256 and digest.hexdigest() != sha256:
                path.unlink()
                return None
            sync(self.objects)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return Stored(name, size, md5.hexdigest())

    def put(self, bucket: str, entry: Entry) -> None:
        """Make a key name received content. The content that it had before is deleted."""
        content = entry.content
        with self._index() as index:
            old = self._files(index, "SELECT file FROM objects WHERE bucket = ? AND key = ?", bucket, entry.key)
            row = (bucket, entry.key, content.file, content.size, content.etag, entry.modified, entry.headers)
            index.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self._delete(old)

    def find(self, bucket: str, key: str) -> Entry | None:
        """Return the object, or None."""
        return next(self._entries("bucket = ? AND key = ?", bucket, key), None)

    def open(self, bucket: str, key: str) -> tuple[Entry, BinaryIO] | None:
        """Return the object with its open file, or None. Replacing or deleting it later does not disturb the reader."""
        while (entry := self.find(bucket, key)) is not None:
            try:
                return entry, (self.objects / entry.content.file).open("rb")
            except FileNotFoundError:
                if self.find(bucket, key) == entry:  # lost, and not replaced a moment ago
                    raise
        return None

    def entries(self, bucket: str, prefix: str, after: str) -> Iterator[Entry]:
        """Yield the objects whose keys begin with `prefix` and come after `after`, in the order of their UTF-8 bytes."""
        return self._entries("bucket = ? AND key > ? AND key >= ? AND substr(key, 1, ?) = ? ORDER BY key",
                             bucket, after, prefix, len(prefix), prefix)  # fmt: skip

    def remove(self, bucket: str, keys: Sequence[str]) -> None:
        """Delete objects; missing ones are ignored."""
        old: list[str] = []
        with self._index() as index:
            for key in keys:
                old += self._files(index, "SELECT file FROM objects WHERE bucket = ? AND key = ?", bucket, key)
                index.execute("DELETE FROM objects WHERE bucket = ? AND key = ?", (bucket, key))
        self._delete(old)

    def begin_upload(self, bucket: str, key: str, headers: str, now: str) -> str:
        """Begin an upload in parts and return its id."""
        upload = secrets.token_hex(16)
        with self._index() as index:
            index.execute("INSERT INTO uploads VALUES (?, ?, ?, ?, ?)", (upload, bucket, key, headers, now))
        return upload

    def upload(self, upload: str, bucket: str, key: str) -> str | None:
        """Return the headers of an upload that began for this key, or None."""
        with self._index() as index:
            found = index.execute(
                "SELECT headers FROM uploads WHERE id = ? AND bucket = ? AND key = ?", (upload, bucket, key)
            )
            row = found.fetchone()
        return None if row is None else str(row[0])

    def put_part(self, upload: str, number: int, content: Stored) -> None:
        """Make received content a part of an upload."""
        with self._index() as index:
            old = self._files(index, "SELECT file FROM parts WHERE upload = ? AND number = ?", upload, number)
            row = (upload, number, content.file, content.size, content.etag)
            index.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?)", row)
        self._delete(old)

    def parts(self, upload: str) -> dict[int, Stored]:
        """Return the parts of an upload by their numbers."""
        with self._index() as index:
            rows = index.execute(
                "SELECT number, file, size, etag FROM parts WHERE upload = ? ORDER BY number", (upload,)
            )
            return {number: Stored(*rest) for number, *rest in rows}

    def read(self, contents: Iterable[Stored]) -> Iterator[bytes]:
        """Yield the bytes of several contents, one after the other."""
        for content in contents:
            with (self.objects / content.file).open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk

    def end_upload(self, upload: str) -> None:
        """Forget an upload and delete its parts."""
        with self._index() as index:
            old = self._files(index, "SELECT file FROM parts WHERE upload = ?", upload)
            index.execute("DELETE FROM parts WHERE upload = ?", (upload,))
            index.execute("DELETE FROM uploads WHERE id = ?", (upload,))
        self._delete(old)

    def end_uploads_before(self, time: str) -> None:
        """Forget uploads that began before an ISO time in UTC: their clients have given up."""
        with self._index() as index:
            old = [str(name) for (name,) in index.execute("SELECT id FROM uploads WHERE began < ?", (time,))]
        for upload in old:
            self.end_upload(upload)

    def _reconcile(self) -> None:
        """Forget objects whose files are lost or cut, so that clients send them again, and delete files that nothing names."""
        sizes = {path.name: path.stat().st_size for path in sorted(self.objects.iterdir())}
        with self._index() as index:
            for table, name in (("objects", "key"), ("parts", "number")):
                for row, file, size, key in index.execute(
                    f"SELECT rowid, file, size, {name} FROM {table} ORDER BY {name}"
                ).fetchall():
                    if sizes.get(file) == size:
                        del sizes[file]
                    else:
                        print(f"the content of {key} is lost; store it again", file=sys.stderr, flush=True)
                        index.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
        self._delete(sizes)

    def _entries(self, where: str, *values: object) -> Iterator[Entry]:
        with self._index() as index:
            rows = index.execute(f"SELECT key, file, size, etag, modified, headers FROM objects WHERE {where}", values)
            for key, file, size, etag, modified, headers in rows:
                yield Entry(key, Stored(file, size, etag), modified, headers)

    @contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        """Open the index for one transaction, which is on disk at the end."""
        path = self.folder / "index.db"
        index = sqlite3.connect(path, timeout=BUSY_SECONDS)
        try:
            index.execute("PRAGMA synchronous = FULL")
            with index:
                yield index
        finally:
            index.close()

    def _files(self, index: sqlite3.Connection, query: str, *values: object) -> list[str]:
        """Begin to write, so that no other thread changes the result of the query, and return its files."""
        if not index.in_transaction:
            index.execute("BEGIN IMMEDIATE")
        return [str(name) for (name,) in index.execute(query, values)]

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.objects / name).unlink(missing_ok=True)
