"""Keep a copy of the last whole dvc.lock: DVC truncates the file and writes it anew after every stage.

A kill or a full disk at that moment leaves it empty or cut. The flow, or the next one, puts the copy in its place; entries that the
copy lacks come back from DVC's cache of runs.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock

from pipelines.tracking.lockfile import has_conflict, lock_problem
from posttrain.files import write_atomic
from tasks.console import print_line
from tasks.lockfile import HEAD

COPY = Path(".posttrain") / "dvc.lock"
_alone = Lock()
"""Stages run in threads of one flow, and `write_atomic` writes under a name for the process."""


def keep_lock(root: Path) -> None:
    """Copy dvc.lock if it looks whole and has changed. Parsing the lock of a hundred stages would take a second."""
    with _alone:
        text = _text(root / "dvc.lock")
        if text.startswith(HEAD.encode()) and text.endswith(b"\n") and text != _text(root / COPY):
            write_atomic(root / COPY, text)


def mend_lock(root: Path) -> bool:
    """Put the copy in the place of a damaged dvc.lock; return True if that was done.

    A merge conflict stays for the user, who knows which side is right.
    """
    from dvc.lock import LockError, make_lock

    folder = root / ".dvc" / "tmp"
    if not _can_be_mended(root) or not folder.is_dir():
        return False
    try:
        with _alone, make_lock(str(folder / "lock"), tmp_dir=str(folder), friendly=True, wait=True):
            if not _can_be_mended(root):  # a dvc was at work, and has finished it
                return False
            write_atomic(root / "dvc.lock", _text(root / COPY))
    except LockError:
        return False
    print_line(
        f"{root / 'dvc.lock'} was damaged, as after a kill or on a full disk; the copy of the last whole one is restored"
    )
    return True


def _can_be_mended(root: Path) -> bool:
    return lock_problem(root) is not None and not has_conflict(root / "dvc.lock") and (root / COPY).is_file()


def _text(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
