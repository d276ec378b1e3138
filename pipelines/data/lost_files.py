"""Refuse accepted files that were lost without a word: `dvc repro` records the rest of a folder as the whole, before ingest runs.

Flows compare the folder with its .dvc file before that (tasks/cache.py). Here the .dvc file is already the new one, so the one that git has
is read.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import yaml

from pipelines.config.yaml_files import parse_written
from pipelines.data.sources import ACCEPTED
from posttrain.errors import DataError
from posttrain.files import files_below

POINTER = f"{ACCEPTED}.dvc"


def refuse_lost_files(project: Path) -> None:
    """Raise DataError if the accepted.dvc of git's index names more files than the folder has."""
    before, now = _staged(project), len(files_below(project / ACCEPTED))
    if before > now:
        raise DataError(
            f"{ACCEPTED} has {now} files, and the {POINTER} of git's index names {before}, as in a clone whose checkout was interrupted."
            f" Their rows would be lost. Type `git checkout {POINTER} && dvc pull {POINTER}` (without a remote: `dvc checkout {POINTER}`)."
            f" If you removed them on purpose, type `git add {POINTER}`; then run again."
        )


def _staged(project: Path) -> int:
    """Return the number of files in the accepted.dvc of git's index; 0 without git, or if it is not there."""
    git = shutil.which("git")
    if git is None:
        return 0
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
        return int(entry.get("nfiles", 0))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):  # not as DVC writes it
        return 0
