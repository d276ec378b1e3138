"""Read DVC's cache, and find objects whose bytes are not those that their name promises.

DVC hashes an object only while it is writable, and makes it read-only then. So a flipped bit on the disk, or an edit through a link,
would go into every later checkout and push.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.data.lost_files import cache_object, lost_or_cut
from pipelines.tracking.content import file_md5, path_md5
from pipelines.tracking.lockfile import read_lock
from posttrain.errors import DataError, OrchestrationError
from posttrain.files import files_below, read_json
from tasks.process import child_environment


def cache_folder(root: Path) -> Path | None:
    """Return the folder of DVC's cache, which may be outside of the project; None if DVC cannot tell."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "cache", "dir"], cwd=root, env=child_environment(), capture_output=True, text=True
    )
    return None if done.returncode else root / done.stdout.strip()


def objects(root: Path, md5: str) -> list[Path]:
    """Return the paths in DVC's cache of an output: of its listing, if it is a folder, and of each of its files.

    A listing that the cache lacks, or that is damaged, is the only path.
    """
    folder = cache_folder(root)
    if folder is None:
        return []
    first = cache_object(folder, md5)
    if not md5.endswith(".dir") or not first.is_file() or is_damaged(first):
        return [first]
    members = [str(entry["md5"]) for entry in read_json(first, "Remove it, then type `dvc pull`.")]
    return [first, *(cache_object(folder, member) for member in dict.fromkeys(members))]


def cached(root: Path, md5: str) -> bool:
    """Return True if every file of an output is in DVC's cache, undamaged."""
    found = objects(root, md5)
    return bool(found) and all(path.is_file() and not is_damaged(path) for path in found)


def damaged_objects(root: Path, md5: str) -> list[Path]:
    """Return those objects of an output in DVC's cache whose bytes are not those of their name."""
    return [path for path in objects(root, md5) if path.is_file() and is_damaged(path)]


def drop_damaged_outputs(root: Path, stage: str) -> list[str]:
    """Return the outputs of a stage whose bytes are not those of their hash in dvc.lock, and remove their damaged objects from the cache.

    Call it after DVC has restored the stage: it copies a read-only object without looking at its bytes.
    """
    outs = {str(out["path"]): str(out.get("md5", "")) for out in read_lock(root).get(stage, {}).get("outs", ())}
    wrong = [path for path, md5 in outs.items() if md5 and (root / path).exists() and path_md5(root / path) != md5]
    for path in wrong:
        for damaged in damaged_objects(root, outs[path]):
            damaged.unlink()
    return wrong


def refuse_damaged(root: Path, md5: str, folder: str, consequence: str) -> None:
    """Raise DataError, which names the `consequence`, if DVC's cache holds damaged bytes of an output."""
    damaged = damaged_objects(root, md5)
    if damaged:
        raise DataError(describe(damaged, folder, consequence))


def describe(damaged: list[Path], folder: str, consequence: str, otherwise: str = "") -> str:
    """Return the words for damaged files, with the remedy; `otherwise` is the one without a remote."""
    otherwise = otherwise or (
        f"if {folder} itself is whole, `dvc commit --force {folder}` stores it again; else `dvc repro` makes it again"
    )
    return (
        f"{len(damaged)} files of {folder} are damaged in DVC's cache (first: {damaged[0]}): their bytes are not those of their hash, as"
        f" after a fault of the disk, so {consequence}. Remove them. Then `dvc pull` fetches them from a remote; {otherwise}."
    )


def refuse_partial(root: Path, pointer: str, folder: Path, entry: Mapping[str, Any]) -> None:
    """Raise OrchestrationError if files that a .dvc file lists are missing in its folder, or are cut short.

    DVC would record the rest as the whole folder. The cache may lack the list of files; then only their number is compared.
    """
    md5 = str(entry.get("md5", ""))
    if not md5.endswith(".dir") or not folder.is_dir():
        return
    present = {path.relative_to(folder).as_posix() for path in files_below(folder) if path.is_file()}
    if (cache := cache_folder(root)) is None:
        return
    listing = cache_object(cache, md5)
    if listing.is_file() and not is_damaged(listing):
        lost = lost_or_cut(folder, listing, cache)
        count, first = len(lost), f" (first: {lost[0]})" if lost else ""
    else:
        count, first = int(entry.get("nfiles", 0)) - len(present), ""
    if count > 0:
        raise OrchestrationError(
            f"{count} files that {pointer} lists are missing or cut short in {folder}{first}, as in a clone whose checkout was interrupted."
            f" DVC would record the rest as the whole, and their rows would be lost. Type `dvc pull {pointer}` (without a remote: `dvc"
            f" checkout {pointer}`). If you removed them on purpose: `dvc add {pointer.removesuffix('.dvc')}`."
        )


def is_damaged(path: Path) -> bool:
    """Return True if an object of the cache does not have the hash that its path says."""
    return file_md5(path) != path.parent.name + path.name.removesuffix(".dir")
