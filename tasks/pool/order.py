"""The order for one stage that a flow sends to a worker: names, hashes and parameter files, and no command.

A worker has its own clone, so whoever can write to Prefect's server can order a stage of a commit that the worker's own git remote has,
with other parameters, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from posttrain.errors import OrchestrationError

_STAGE = re.compile(r"[A-Za-z0-9_]+(@[A-Za-z0-9_-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
PARAMS = "params.yaml"


@dataclass(frozen=True)
class StageOrder:
    """One stage of a commit, with the inputs that it must use."""

    name: str
    commit: str
    files: Mapping[str, str]
    """Text, by path, of params.yaml and .dvc files that differ from the commit."""
    lock: str
    """A dvc.lock that holds only the hashes of the stage's inputs."""

    @property
    def key(self) -> str:
        """Return the sha256 of the order. Equal orders have equal results, so they share checkpoints and, while one runs, the run."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def parameters(self) -> dict[str, Any]:
        """Return the order as parameters of a flow run."""
        return {**asdict(self), "files": dict(self.files)}


def checked(name: str, commit: str, files: Mapping[str, str], lock: str) -> StageOrder:
    """Return the order. Raises OrchestrationError if a value could name a file or a command of the worker's machine."""
    if not _STAGE.fullmatch(name):
        raise OrchestrationError(f"{name!r} is not the name of a stage; the worker refuses the order.")
    if not _COMMIT.fullmatch(commit):
        raise OrchestrationError(f"{commit!r} is not a commit's full hash; the worker refuses the order.")
    wrong = next((path for path in files if not may_differ(path)), None)
    if wrong is not None:
        raise OrchestrationError(f"{wrong!r} must come from the commit, not with an order; the worker refuses it.")
    return StageOrder(name, commit, dict(files), lock)


def may_differ(path: str) -> bool:
    """Return True for files that an order may bring: params.yaml, .dvc files, which name data by their hash, and their .gitignore.

    Example:
        >>> [may_differ(path) for path in ("params.yaml", "data/raw/accepted.dvc", "../a.dvc", ".git/a.dvc", "posttrain/api.py")]
        [True, True, False, False, False]
    """
    *folders, name = PurePosixPath(path).parts
    inside = not path.startswith("/") and not any(folder.startswith(".") for folder in folders)
    return inside and (path == PARAMS or name == ".gitignore" or (name.endswith(".dvc") and not name.startswith(".")))
