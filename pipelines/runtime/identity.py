"""What a run is: its stage, the values of its declared parameters, the content of its inputs. Never clock or host.

Code is no part of the key, so that an edit which changes no result changes no byte downstream. It is what a checkpoint belongs to:
see `code_digest`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.config.params import read_yaml
from pipelines.runtime.journal import representable
from posttrain.errors import DataError

SOURCES = Path(__file__).parents[2]
"""The folder of the packages that run."""
LIBRARIES = ("accelerate", "numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")


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


def code_digest(project: Path, stage: str) -> str:
    """sha256 of the Python sources that dvc.yaml declares for a stage, and of the versions that compute.

    A checkpoint is continued only by the code that wrote it: DVC runs a stage again when these sources have changed, and half of a
    result from the old ones would be nobody's.
    """
    graph = project / "dvc.yaml"
    stages = (read_yaml(graph) or {}).get("stages") or {} if graph.is_file() else {}
    declared = [str(dependency) for dependency in (stages.get(stage) or {}).get("deps") or ()]
    sources = {name: digest for entry in declared for name, digest in _sources(project, entry).items()}
    libraries = {name: version(name) for name in LIBRARIES} | {"python": sys.version}
    return hashlib.sha256(json.dumps([sources, libraries], sort_keys=True).encode()).hexdigest()


def _sources(project: Path, entry: str) -> dict[str, str]:
    """Digest by name of the .py files of one dependency: of the packages that run, else of the project."""
    root = next((base for base in (SOURCES, project) if (base / entry).exists()), project)
    path = root / entry
    files = [path] if path.suffix == ".py" and path.is_file() else path.rglob("*.py")
    return {file.relative_to(root).as_posix(): file_digest(file) for file in files}
