"""Checkpoints of a stage in DVC's remote, so that a different worker can go on.

An object is `posttrain/checkpoints/ORDER/STEP-SHA256.tar` with the run's journal and one checkpoint. ORDER is the order's key, so every
attempt of a stage finds it. A checkpoint of equal inputs is right whoever wrote it: a late worker cannot do harm here.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.runtime.context import CHECKPOINTS, LOCK
from pipelines.runtime.identity import file_digest
from tasks.pool.transfer import opened, put_file

RUNS = Path(".posttrain") / "runs"
_OBJECT = re.compile(r"(\d+)-([0-9a-f]{64})\.tar")
_STEP = re.compile(r"[a-z]+-(\d+)")
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint in a worktree."""

    run: Path
    """Folder of the run's live state."""
    folder: Path
    step: int


def newest(tree: Path, stage: str) -> Checkpoint | None:
    """Return the stage's newest complete checkpoint in the worktree; a partial one has a different name."""
    found = [
        Checkpoint(folder.parents[2], folder, int(match[1]))
        for folder in (tree / RUNS).glob(f"{stage.replace('@', '-')}-*/{CHECKPOINTS}/*/*")
        if (match := _STEP.fullmatch(folder.name)) and not folder.name.startswith("partial")
    ]
    return max(found, key=lambda each: (each.folder.stat().st_mtime_ns, each.step), default=None)


def upload(tree: Path, key: str, checkpoint: Checkpoint) -> str | None:
    """Copy the checkpoint to the remote and return its name; None if the step removed it meanwhile. Older ones are removed."""
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        path = Path(folder) / "checkpoint.tar"
        try:
            _pack(path, checkpoint)
        except FileNotFoundError:
            return None
        name = f"{checkpoint.step}-{file_digest(path)}.tar"
        with opened(tree) as repo:
            fs, place = _place(repo, key)
            older = [each for each in _listed(fs, place) if each != name]
            put_file(fs, path, fs.join(place, name))
            for each in older[KEPT - 1 :]:
                fs.remove(fs.join(place, each))
    return name


def _pack(path: Path, checkpoint: Checkpoint) -> None:
    """Write the archive: first the checkpoint, then the journal, which must not be behind it."""
    with tarfile.open(path, "w") as archive:
        archive.add(checkpoint.folder, Path(checkpoint.run.name) / checkpoint.folder.relative_to(checkpoint.run))
        for file in sorted(checkpoint.run.iterdir()):
            if file.name not in (CHECKPOINTS, LOCK):
                archive.add(file, Path(checkpoint.run.name) / file.name)


def download(repo: Any, tree: Path, key: str, stage: str) -> str | None:
    """Unpack the newest checkpoint whose content has its name's hash, and return its name; None if the remote has none.

    One that is older than this machine's own is not unpacked: its journal would be behind the own checkpoint.
    """
    fs, place = _place(repo, key)
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        for name in _listed(fs, place):
            path = Path(folder) / "checkpoint.tar"
            try:
                fs.get_file(fs.join(place, name), str(path))
            except FileNotFoundError:  # a different worker has just removed it
                continue
            if file_digest(path) == _parts(name)[1] and _unpack(path, tree, stage, _parts(name)[0]):
                return name
    return None


def _own_step(tree: Path, run: str) -> int:
    """Return the step of the newest complete checkpoint of a run in the worktree, or -1."""
    steps = [_STEP.fullmatch(folder.name) for folder in (tree / RUNS / run / CHECKPOINTS).glob("*/*")]
    return max((int(step[1]) for step in steps if step and not step[0].startswith("partial")), default=-1)


def _unpack(path: Path, tree: Path, stage: str, step: int) -> bool:
    """Unpack files and folders into the folder of live runs, unless these are ahead of `step`.

    Return False if the archive holds anything else or would write elsewhere.
    """
    prefix = f"{stage.replace('@', '-')}-"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        if not all(_is_of_run(member, prefix) for member in members):
            return False
        if max(_own_step(tree, PurePosixPath(member.name).parts[0]) for member in members) > step:
            return True
        for member in members:
            place = tree / RUNS / member.name
            (place if member.isdir() else place.parent).mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            if content is not None:
                with content, place.open("wb") as file:
                    shutil.copyfileobj(content, file)
    return True


def _is_of_run(member: tarfile.TarInfo, prefix: str) -> bool:
    """Return True for a file or folder below a run whose name begins so."""
    path = PurePosixPath(member.name)
    inside = not path.is_absolute() and ".." not in path.parts and path.parts[:1] != ()
    return inside and path.parts[0].startswith(prefix) and (member.isfile() or member.isdir())


def remove(tree: Path, key: str) -> None:
    """Remove the order's checkpoints from the remote."""
    with opened(tree) as repo:
        fs, place = _place(repo, key)
        for name in _listed(fs, place):
            fs.remove(fs.join(place, name))


def _place(repo: Any, key: str) -> tuple[Any, str]:
    """Return the remote's file system, and the folder of an order's checkpoints there."""
    remote = repo.cloud.get_remote()
    return remote.fs, remote.fs.join(remote.path, "posttrain", "checkpoints", key)


def _listed(fs: Any, place: str) -> list[str]:
    """Return the names of the checkpoints in a folder of the remote, the newest first."""
    fs.fs.invalidate_cache()  # a store remembers earlier listings
    names = [fs.name(path) for path in fs.find(place)] if fs.exists(place) else []
    return sorted((name for name in names if _OBJECT.fullmatch(name)), key=_parts, reverse=True)


def _parts(name: str) -> tuple[int, str]:
    match = _OBJECT.fullmatch(name)
    assert match is not None
    return int(match[1]), match[2]
