"""Restore the champion's weights to models/champion: DVC fetches them by the hash that the registry points at.

This module writes champion.dvc, so that `dvc pull` fetches the champion and `dvc gc --workspace` keeps it, like every other output.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipelines.config.yaml_files import read_yaml
from pipelines.promotion.registry import FOLDER_HASH, PATH, Version
from pipelines.tracking.content import folder_md5
from posttrain.errors import ConfigError, OrchestrationError
from posttrain.files import write_atomic
from tasks.cache import cached, damaged_objects, describe
from tasks.console import print_line
from tasks.remote import has_remote, run_dvc

FOLDER = Path("models/champion")
POINTER = Path("champion.dvc")
PENDING = Path(".posttrain/champion.pending")
"""Present while models/champion does not hold the registry's champion: a flow brings it there when it ends."""

KEPT = "kept-by-alias"
"""Beginning of the names of .dvc files that exist while `flows.clean_cache` collects, and name the weights to keep."""

T = TypeVar("T")


@task(name="restore champion", task_run_name="restore champion", cache_policy=NO_CACHE, persist_result=False)
def restore_champion(root: str, version: Version) -> Path:
    """Restore the version's weights to models/champion, from the cache or else from the remote."""
    restore(Path(root), version)
    return FOLDER


@contextmanager
def switching(root: Path) -> Iterator[None]:
    """Hold the one lock around the champion's weights and aliases; a second promotion waits for the first."""
    path = root / ".posttrain" / "promotion.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def put_into_production(root: Path, version: Version, move: Callable[[], T], *, busy: bool = False) -> T:
    """Restore the weights, then call `move`, which moves the aliases: production never points at weights that are not there.

    If `busy` is true, a flow is using models/champion: the weights only have to be in DVC's cache, and that flow restores them when it
    ends. Raises OrchestrationError, with folder and aliases unchanged, if the weights cannot be restored. Call it inside `switching`.
    """
    if version.fault:
        raise OrchestrationError(version.fault)
    if busy and not cached(root, version.md5):
        raise OrchestrationError(
            f"the weights of {version.name} ({version.md5}) are not in DVC's cache, or are damaged there, and they cannot be fetched while"
            " a flow is running here. Nothing was changed. Wait for that flow or stop it, then run again."
        )
    before = _pointer_content(root)
    if not busy:
        restore(root, version)
    write_atomic(root / PENDING, f"{version.md5}\n".encode())
    try:
        moved = move()
    except BaseException:
        if not busy and before is not None:
            _put_back(root, before)
        raise
    if not busy:
        (root / PENDING).unlink(missing_ok=True)
    return moved


def follow(root: Path, champion: Version) -> bool:
    """Restore the champion if models/champion holds something else, and return True if so. Call it inside `switching`."""
    changed = not holds(root, champion)
    if changed:
        restore(root, champion)
    (root / PENDING).unlink(missing_ok=True)
    return changed


def production(root: Path) -> str | None:
    """Return the hash of the weights that champion.dvc names, or None. Raises OrchestrationError if the file is damaged."""
    entry = pointer_entry(root)
    return None if entry is None else str(entry["md5"])


def pointer_entry(root: Path) -> dict[str, Any] | None:
    """Return the entry of champion.dvc, or None if there is no such file."""
    if not (root / POINTER).is_file():
        return None
    try:
        (entry,) = read_yaml(root / POINTER)["outs"]
        if not FOLDER_HASH.fullmatch(entry["md5"]):
            raise ValueError(entry["md5"])
        return {"nfiles": 1, "md5": entry["md5"], "size": entry["size"], **entry}
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise OrchestrationError(
            f"{POINTER} is damaged ({type(error).__name__}), so the weights in production are unknown. Restore it with `git checkout"
            f" {POINTER}`, or write it anew by promoting a version: `python -m flows.promote 1`."
        ) from error


def holds(root: Path, version: Version) -> bool:
    """Return True if champion.dvc names the version's weights and the folder exists."""
    return _pointer_content(root) == pointer(version).encode() and (root / FOLDER).is_dir()


def restore(root: Path, version: Version) -> None:
    """Check the weights out of DVC's cache, or pull them. Every byte is compared with the hash.

    Raises OrchestrationError, with the folder unchanged, if neither cache nor remote has them.
    """
    before = _pointer_content(root)
    write_atomic(root / POINTER, pointer(version).encode())
    problem = _fetch(root, version)
    if problem is None:
        return
    if before is None:
        (root / POINTER).unlink()
    else:
        _put_back(root, before)
    raise OrchestrationError(problem)


def _fetch(root: Path, version: Version) -> str | None:
    """Bring the weights that champion.dvc names to its folder. Return why that is not possible, or None."""
    if run_dvc(root, "checkout", "--force", str(POINTER)) is None:
        if folder_md5(root / FOLDER) == version.md5:
            return None
        damaged = damaged_objects(root, version.md5)
        if not damaged or not has_remote(root):
            nothing = f"{version.name} is not brought to {FOLDER}"
            return describe(damaged, version.tags.get(PATH, str(FOLDER)), nothing) if damaged else _altered(version)
        print_line(
            f"{len(damaged)} files of {version.name} are damaged in DVC's cache; they are fetched from the remote"
        )
        for path in damaged:
            path.unlink()
        folder = root / FOLDER  # DVC considers it current, and would leave it
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    error = run_dvc(root, "pull", "--force", str(POINTER))
    if error is not None:
        return (
            f"the weights of {version.name} ({version.md5}, {version.tags.get(PATH)}) are neither in DVC's cache nor in its"
            f" remote: {error}. `dvc remote list` shows the remotes that DVC reads. Correct the remote, or promote a"
            " version whose weights exist."
        )
    return None if folder_md5(root / FOLDER) == version.md5 else _altered(version)


def _altered(version: Version) -> str:
    return (
        f"{FOLDER} does not hold the weights of {version.name} ({version.md5}) after `dvc checkout` and `dvc pull`: their bytes are others,"
        " so they are not put into production. The remote may be damaged: restore it from a back-up, or promote a different version."
    )


def remove_left_pointers(root: Path) -> None:
    """Remove the .dvc files of a killed `flows.clean_cache`: DVC would take them for data that is missing. Call it inside the flow lock."""
    for left in sorted(root.glob(f"{KEPT}-*.dvc")):
        left.unlink()
        print_line(f"{left.name} of a clean_cache that was killed is removed")


def _put_back(root: Path, before: bytes) -> None:
    """Restore champion.dvc and its folder as they were."""
    write_atomic(root / POINTER, before)
    run_dvc(root, "checkout", "--force", str(POINTER))


def _pointer_content(root: Path) -> bytes | None:
    """Return the bytes of champion.dvc, which may be damaged, or None if there is no such file."""
    path = root / POINTER
    return path.read_bytes() if path.is_file() else None


def pointer(version: Version, folder: Path = FOLDER) -> str:
    """Return the content of champion.dvc, as `dvc add` would write it. Raises DataError if the version's tags are wrong."""
    lines = "".join(f"  {key}: {value}\n" for key, value in version.entry.items())
    return f"outs:\n- {lines.lstrip()}  hash: md5\n  path: {folder.as_posix()}\n"
