"""What a run is: its stage, the values of its declared parameters, the content of its inputs. Never clock or host."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.journal import representable
from posttrain.errors import DataError


def file_digest(path: Path) -> str:
    """sha256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """sha256 of a file, or of a folder's sorted relative names and contents."""
    if path.is_file():
        return file_digest(path)
    files = sorted(path.rglob("*"), key=lambda p: p.relative_to(path).as_posix())
    lines = [f"{p.relative_to(path).as_posix()} {file_digest(p)}\n" for p in files if p.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def input_digests(stage: str, inputs: Iterable[str | Path]) -> dict[str, str]:
    """Digest by path as given. A missing input raises DataError."""
    digests = {}
    for entry in inputs:
        path = Path(entry)
        if not path.exists():
            raise DataError(
                f"{stage} needs {path}, which is not there. `dvc repro` makes the inputs of a stage before the stage."
            )
        digests[path.as_posix()] = content_digest(path)
    return digests


def run_key(name: str, values: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """sha256 over the run's name, parameters and inputs."""
    identity = representable({"name": name, "params": dict(values), "inputs": dict(inputs)})
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
