"""Compute a run's identity from its stage, its declared parameters and the content of its inputs, never from clock or host.

The key does not include the code, so a code edit that changes no result changes no byte downstream. Checkpoints depend on the code as
well: see `code_digest`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.journal import representable
from posttrain.errors import DataError
from posttrain.files import files_below

SOURCES = Path(__file__).parents[2]
"""Folder of the packages that are running."""
LIBRARIES = ("accelerate", "numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")
"""Packages whose version is part of the code digest."""


def file_digest(path: Path) -> str:
    """Return the sha256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """Return the sha256 of a file, or of a folder's sorted relative names and contents."""
    if path.is_file():
        return file_digest(path)
    return joined_digest(folder_digests(path))


def folder_digests(path: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder by its relative name, sorted by name."""
    files = sorted((file.relative_to(path).as_posix(), file) for file in files_below(path))
    return {name: file_digest(file) for name, file in files if file.is_file()}


def joined_digest(digests: Mapping[str, str]) -> str:
    """Return the sha256 of a folder from the digests of its files."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()


def require_inputs(stage: str, inputs: Iterable[str | Path], project: Path) -> None:
    """Raise DataError if an input is missing."""
    for path in map(Path, inputs):
        if not (project / path).exists():
            raise DataError(
                f"{stage}: the input {path} does not exist. Run `dvc repro`, which makes the inputs of a stage first."
            )


def input_digests(stage: str, inputs: Sequence[str | Path]) -> dict[str, str]:
    """Return the digest of each input, by its path as given. Raises DataError if an input is missing."""
    require_inputs(stage, inputs, Path())
    return {path.as_posix(): content_digest(path) for path in map(Path, inputs)}


def run_key(name: str, values: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the sha256 of the run's name, parameters and inputs."""
    identity = representable({"name": name, "params": dict(values), "inputs": dict(inputs)})
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def code_digest(project: Path, stage: str) -> str:
    """Return the sha256 of the Python sources that dvc.yaml declares for a stage, and of the library versions.

    Only the code that wrote a checkpoint continues it. DVC reruns a stage if its sources changed, and a result computed half by the old
    code would not be reproducible.
    """
    graph = project / "dvc.yaml"
    stages = (read_yaml(graph) or {}).get("stages") or {} if graph.is_file() else {}
    declared = [str(dependency) for dependency in (stages.get(stage) or {}).get("deps") or ()]
    sources = {name: digest for entry in declared for name, digest in _sources(project, entry).items()}
    libraries = {name: version(name) for name in LIBRARIES} | {"python": sys.version}
    return hashlib.sha256(json.dumps([sources, libraries], sort_keys=True).encode()).hexdigest()


def _sources(project: Path, entry: str) -> dict[str, str]:
    """Return the digest, by name, of a dependency's .py files; running packages are searched before the project."""
    root = next((base for base in (SOURCES, project) if (base / entry).exists()), project)
    path = root / entry
    single = path.suffix == ".py" and path.is_file()
    files = [path] if single else [file for file in files_below(path) if file.suffix == ".py"]
    return {file.relative_to(root).as_posix(): file_digest(file) for file in files}
