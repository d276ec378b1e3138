"""An inbox that is a folder: finished files are claimed by a rename into a hidden folder next to them.

    INBOX/.claimed/1/TABLE/NAME     claimed; still there if the process that read it was killed
    INBOX/.claimed/2/TABLE/NAME     claimed for the second time

A file that has ended two processes is quarantined: most likely it needs more memory than there is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pipelines.data import size_limit
from pipelines.data.folders import exists, opened
from pipelines.data.inbox import QUARANTINED, Arrival, Inbox, StoreInbox, free_names, unusable, waits
from posttrain.errors import ConfigError, DataError
from posttrain.files import named_in_errors

CLAIMED = ".claimed"
_ATTEMPTS = ("1", "2")
_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Errors that are no fault of one entry."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_OWN_FOLDERS = (".dvc", ".git", ".posttrain", "data", "labels", "models", "report", "runs")
"""Folders of a project whose files are not arrivals."""
_NAME_BYTES = 200
"""Longest name in quarantine; with `-2` and `.reason.txt` it stays below the 255 bytes of a file system."""


def settle_seconds() -> float:
    """Return POSTTRAIN_SETTLE_SECONDS, the time for which a file must not have changed. Raises ConfigError if it is no number."""
    text = os.environ.get("POSTTRAIN_SETTLE_SECONDS", "10")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise ConfigError(f"POSTTRAIN_SETTLE_SECONDS = {text[:40]!r}: must be a number of seconds from 0 to 3600.")
    return seconds


class FolderInbox:
    def __init__(self, base: Path, *, required: bool = False) -> None:
        self.where, self.base = str(base), base
        if required and not base.is_dir():
            raise DataError(
                f"the inbox {base} is not a folder, so no new data would ever arrive. Correct POSTTRAIN_INBOX, or make it:"
                f" mkdir -p {base}"
            )

    def arrivals(self) -> list[Arrival]:
        with self._reached():
            if not self.base.exists():
                return []
            if not self.base.is_dir():
                raise unusable(self.where, "it is a file and must be a folder")
            recovered = list(self.recovered())
            first = {arrival.place: arrival for arrival in self._scan("")}
        wait = max((_age_to_wait(arrival) for arrival in first.values() if not arrival.left), default=0.0)
        time.sleep(wait)
        with self._reached():
            second = list(self._scan(""))
        found = [_settled(arrival, first.get(arrival.place)) for arrival in second]
        return sorted([*recovered, *found], key=lambda arrival: (not arrival.attempts, arrival.name))

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Hold a lock on the folder, without waiting: whoever writes into the inbox could hold it for ever."""
        if not self.base.is_dir():  # `arrivals` reports it
            yield True
            return
        with self._reached():
            descriptor = os.open(self.base, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(descriptor)

    def claim(self, arrival: Arrival) -> Arrival:
        attempt = arrival.attempts
        if attempt >= len(_ATTEMPTS):
            return arrival
        target = f"{CLAIMED}/{_ATTEMPTS[attempt]}/{arrival.name}"
        try:
            with self._opened(arrival.place) as (source, name), opened(self.base, target, make=True) as (folder, file):
                if exists(file, folder):
                    return replace(arrival, left="an older file of this name is still being dealt with")
                os.rename(name, file, src_dir_fd=source, dst_dir_fd=folder)
        except FileNotFoundError:
            return replace(arrival, left="it has vanished")
        except OSError as error:
            if error.errno in _BROKEN:
                raise unusable(self.where, error.strerror) from error
            return replace(
                arrival, left=f"it cannot be moved: {error.strerror}; give this user the right to write in its folder"
            )
        claimed = replace(arrival, place=str(self.base / target))
        if not self.unchanged(claimed):
            self.give_back(claimed)
            return replace(arrival, left="it was changed a moment ago; the next run takes it")
        return claimed

    def fetch(self, arrival: Arrival, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._opened(arrival.place) as (folder, name):
                descriptor = os.open(name, _READ, dir_fd=folder)
        except PermissionError as error:
            raise DataError(f"{arrival.file}: this user may not read it; `chmod u+r` it and move it back") from error
        except OSError as error:
            raise DataError(f"{arrival.file}: it cannot be opened: {error.strerror}") from error
        with open(descriptor, "rb") as source, named_in_errors(target), target.open("wb") as local:
            size_limit.copy(source, local, arrival.file)

    def unchanged(self, arrival: Arrival) -> bool:
        with self._reached():
            try:
                with self._opened(arrival.place) as (folder, name):
                    now = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    return _state(now) == arrival.state and not being_written(name, folder)
            except (
                FileNotFoundError,
                NotADirectoryError,
                PermissionError,
            ):  # somebody has moved it away, or closed its folder
                return False

    def remove(self, arrival: Arrival) -> None:
        with self._reached(), self._opened(arrival.place) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def give_back(self, arrival: Arrival) -> None:
        """Rename the file to its old place, or next to it if a new file has come there. One that has vanished stays away."""
        with self._reached(), suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            self._move(arrival, arrival.name)

    def quarantine(self, arrival: Arrival, reason: str) -> str:
        folder, file = os.path.split(f"{QUARANTINED}/{arrival.name}")
        with self._reached():
            try:
                self._move(arrival, f"{folder}/{_shortened(file)}", reason)
            except OSError as error:
                if error.errno in _BROKEN:
                    raise
                return f"it cannot be moved to {folder}: {error.strerror}; give this user the right to write there"
        return ""

    def _move(self, arrival: Arrival, wanted: str, reason: str = "") -> None:
        """Rename a claimed file to a free name, with its reason next to it."""
        with self._opened(arrival.place) as (source, name), opened(self.base, wanted, make=True) as (folder, file):
            unused = (each for each in free_names(file) if not exists(each, folder))
            free = next(each for each in unused if not reason or _explained(each, folder, reason))
            os.rename(name, free, src_dir_fd=source, dst_dir_fd=folder)

    def _opened(self, place: str) -> AbstractContextManager[tuple[int, str]]:
        """Open the folder of an entry of this inbox."""
        return opened(self.base, os.path.relpath(place, self.base))

    def recovered(self) -> Iterator[Arrival]:
        """Yield files that a killed process had claimed."""
        for number, attempt in enumerate(_ATTEMPTS, start=1):
            for arrival in self._scan(f"{CLAIMED}/{attempt}"):
                yield replace(arrival, attempts=number)

    def _scan(self, below: str) -> Iterator[Arrival]:
        """Yield the entries under a folder, by name. Links are never followed."""
        top = self.base / below if below else self.base
        if not top.is_dir() or any((self.base / part).is_symlink() for part in (CLAIMED, below) if below):
            return
        pending = [""]
        while pending:
            inside = pending.pop()
            try:
                entries = sorted(os.scandir(top / inside), key=lambda entry: entry.name)
            except OSError as error:
                if not inside:
                    raise
                yield Arrival(_printable(inside), str(top / inside), left=f"it cannot be listed: {error.strerror}")
                continue
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                if not waits(name):
                    continue
                if _is_folder(entry):
                    pending.append(name)
                elif (arrival := _arrival(name, entry.path)) is not None:
                    yield arrival

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unusable(self.where, error.strerror or error) from error


def being_written(path: str, folder: int | None = None) -> bool:
    """Return True if a process has the file open for writing, as far as the file system can say (a lease is refused then)."""
    try:
        descriptor = os.open(path, _READ, dir_fd=folder)
    except OSError:
        return False
    # the kernel asks the holder of a lease by SIGIO to give it up, which would end the process
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGIO, signal.SIG_IGN) if main else None
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        os.close(descriptor)
        if main:
            signal.signal(signal.SIGIO, before)
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _arrival(name: str, place: str) -> Arrival | None:
    try:
        status = os.lstat(place)
    except FileNotFoundError:
        return None
    except OSError as error:  # a folder that this user may list but not enter, or a path that is too long
        return Arrival(_printable(name), place, left=f"it cannot be looked at: {error.strerror}")
    kind = _not_a_file(status.st_mode)
    if kind:
        return Arrival(_printable(name), place, left=f"it is {kind}; put the file itself here")
    if _printable(name) != name:
        return Arrival(_printable(name), place, left="its name is not printable UTF-8; rename it")
    return Arrival(name, place, _state(status))


def _explained(name: str, folder: int, reason: str) -> bool:
    """Write the reason next to a file of this name. Return False if there is another entry, such as a pipe or a link."""
    note, text = f"{name}.reason.txt", (reason + "\n").encode("utf-8", "backslashreplace")
    try:
        with open(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder), "wb") as file:
            file.write(text)
    except FileExistsError:
        return _holds(note, folder, text)  # a process was killed before it moved the file
    return True


def _holds(name: str, folder: int, content: bytes) -> bool:
    try:
        with open(os.open(name, _READ, dir_fd=folder), "rb") as file:
            return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.read(len(content) + 1) == content
    except OSError:
        return False


def _not_a_file(mode: int) -> str:
    if stat.S_ISREG(mode):
        return ""
    names = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def _state(status: os.stat_result) -> tuple[object, ...]:
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def _age_to_wait(arrival: Arrival) -> float:
    """Return the seconds until the file is old enough; a time in the future (the clock was set back) counts as now."""
    settle, changed = settle_seconds(), float(str(arrival.state[1])) / 1e9
    age = max(0.0, time.time() - changed)
    return max(0.0, settle - age)


def _settled(arrival: Arrival, before: Arrival | None) -> Arrival:
    if arrival.left:
        return arrival
    if before is None or before.state != arrival.state or being_written(arrival.place):
        return replace(arrival, left="it is still being written; the next run takes it")
    return arrival


def _printable(name: str) -> str:
    clean = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in clean)


def _shortened(file: str) -> str:
    encoded = file.encode("utf-8")
    if len(encoded) <= _NAME_BYTES:
        return file
    stem, suffix = os.path.splitext(file)
    kept = stem.encode("utf-8")[: _NAME_BYTES - len(suffix.encode("utf-8")[:20])].decode("utf-8", "ignore")
    return kept + suffix.encode("utf-8")[:20].decode("utf-8", "ignore")


def claimed_files(address: str) -> list[str]:
    """Return the names of files that a killed process has left claimed; none for a store."""
    inbox = open_inbox(address)
    return [arrival.name for arrival in inbox.recovered()] if isinstance(inbox, FolderInbox) else []


def open_inbox(address: str, *, required: bool = False) -> Inbox:
    """Open a folder or a store. The current directory is the project.

    `required` refuses a folder that does not exist, which a misspelt setting looks like. Raises DataError for a folder of other files: they
    would be moved to quarantine, or removed as known.
    """
    if "://" in address and not address.startswith("file://"):
        return StoreInbox(address)
    base = Path(address.removeprefix("file://")).expanduser()
    _refuse_other_files(base, Path.cwd())
    return FolderInbox(base, required=required)


def _refuse_other_files(base: Path, project: Path) -> None:
    """Raise DataError if the inbox contains the project or the home folder, or is a folder of the project with other contents."""
    inbox, own, home = base.resolve(), project.resolve(), Path(os.path.expanduser("~")).resolve()
    holds = "this project" if own.is_relative_to(inbox) else "your home folder" if home.is_relative_to(inbox) else ""
    taken = next((name for name in _OWN_FOLDERS if inbox.is_relative_to(own / name)), None)
    if holds or taken:
        reason = f"it contains {holds}" if holds else f"it is in {taken}/ of this project"
        raise DataError(
            f"the inbox {base} cannot be used: {reason}, and intake moves every file of its inbox. Nothing was moved. Make a folder for new"
            " files only, and set POSTTRAIN_INBOX to it."
        )
