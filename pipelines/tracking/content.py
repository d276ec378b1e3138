"""Compare files with the hashes that DVC knows them by. DVC itself trusts every read-only object of its cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from posttrain.files import files_below

_CHUNK = 1 << 20


def file_md5(path: Path) -> str:
    """Return the hash by which DVC knows a file."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_md5(folder: Path) -> str:
    """Return the hash by which DVC knows a folder."""
    paths = sorted(path.relative_to(folder).as_posix() for path in files_below(folder))
    listing = [{"md5": file_md5(folder / path), "relpath": path} for path in paths]
    return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"


def path_md5(path: Path) -> str:
    """Return the hash by which DVC knows a file or a folder."""
    return folder_md5(path) if path.is_dir() else file_md5(path)
