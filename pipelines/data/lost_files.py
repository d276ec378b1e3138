"""Refuse accepted files that were lost without a word: `dvc repro` records the rest of a folder as the whole, before ingest runs.

Flows compare the folder with its .dvc file before that (tasks/cache.py). Here the .dvc file is already the new one, so the one that git has
is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.config.yaml_files import parse_written
from pipelines.data.sources import ACCEPTED
from posttrain.errors import DataError
from posttrain.files import files_below

POINTER = f"{ACCEPTED}.dvc"
_CHUNK = 1 << 20


def refuse_lost_files(project: Path) -> None:
    """Raise DataError if the folder lacks files that the accepted.dvc of git's index names, or has only the beginning of one.

    DVC's cache may lack the list of files; then only their number is compared.
    """
    staged = _staged(project)
    before, now = int(staged.get("nfiles", 0)), len(files_below(project / ACCEPTED))
    lost = _lost(project, str(staged.get("md5", "")))
    if before <= now and not lost:
        return
    found = f"{ACCEPTED} has {now} files, and the {POINTER} of git's index names {before}"
    if lost:
        found = f"{len(lost)} files that the {POINTER} of git's index names are missing or cut short in {ACCEPTED} (first: {lost[0]})"
    raise DataError(
        f"{found}, as in a clone whose checkout was interrupted. Their rows would be lost. Type `git checkout {POINTER} && dvc pull"
        f" {POINTER}` (without a remote: `dvc checkout {POINTER}`). If you removed or changed them on purpose, type `git add"
        f" {POINTER}`; then run again."
    )


def lost_or_cut(folder: Path, listing: Path, cache: Path) -> list[str]:
    """Return those files of a listing of DVC's cache that are missing in a folder, or are only a beginning of the object in the cache."""
    listed = {str(each["relpath"]): cache_object(cache, str(each["md5"])) for each in json.loads(listing.read_bytes())}
    return [name for name, whole in listed.items() if _is_lost(folder / name, whole)]


def cache_object(cache: Path, md5: str) -> Path:
    """Return the path of an object in DVC's cache."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def _lost(project: Path, md5: str) -> list[str]:
    """Return the lost files of the folder that had the hash; none if DVC's cache lacks its listing, or has a damaged one."""
    pointer = project / POINTER
    if not md5.endswith(".dir") or (pointer.is_file() and md5 in pointer.read_text(encoding="utf-8", errors="replace")):
        return []
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "cache", "dir"],
        cwd=project,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    cache = project / done.stdout.strip()
    listing = cache_object(cache, md5)
    if done.returncode or not listing.is_file():
        return []
    whole = hashlib.md5(listing.read_bytes(), usedforsecurity=False).hexdigest() == md5.removesuffix(".dir")
    return lost_or_cut(project / ACCEPTED, listing, cache) if whole else []


def _is_lost(path: Path, whole: Path) -> bool:
    """Return True if a file is missing, or is the beginning of the object that the cache holds for it."""
    if not path.is_file():
        return True
    if not whole.is_file() or path.stat().st_size >= whole.stat().st_size:
        return False
    with path.open("rb") as mine, whole.open("rb") as theirs:
        while chunk := mine.read(_CHUNK):
            if chunk != theirs.read(len(chunk)):
                return False
    return True


def _staged(project: Path) -> Mapping[str, Any]:
    """Return the entry of the accepted.dvc of git's index; nothing without git, or if it is not there."""
    git = shutil.which("git")
    if git is None:
        return {}
    done = subprocess.run(
        [git, "show", f":./{POINTER}"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    try:
        (entry,) = parse_written(done.stdout)["outs"] if done.returncode == 0 else ({},)
        int(entry.get("nfiles", 0))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):  # not as DVC writes it
        return {}
    return entry
