"""Detect parameters, code and data that changed while a step ran. DVC hashes them only after the step has ended.

Without this check, dvc.lock would name the new values next to a model that was trained with the old ones, and `dvc status` would report
everything as up to date.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.config.params import flatten
from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.identity import SOURCES, content_digest, file_digest
from pipelines.runtime.journal import representable
from posttrain.errors import ConfigError, TrackingError
from posttrain.files import write_atomic

VARIABLE = "POSTTRAIN_SNAPSHOT"
"""Names the file to which a step writes its snapshot, so that a flow can repeat the check after dvc has ended."""
_SHOWN = 3
_CODE = ("posttrain", "pipelines")


@dataclass(frozen=True)
class InputSnapshot:
    """The inputs that a stage read at its start: values of params.yaml, hashes of its code, size and time of its data."""

    stage: str
    params: str | None
    """Path of the project's params.yaml; None if the step reads a different file, which DVC does not record."""
    values: dict[str, Any]
    code: dict[str, str]
    data: dict[str, list[int]]
    declared: list[str]
    """Prefixes of the parameters."""
    entries: list[str]
    """Files and folders of dvc.yaml on which the stage depends."""

    @classmethod
    def take(cls, stage: str, params: Path, declared: Iterable[str], inputs: Iterable[str | Path]) -> InputSnapshot:
        """Take the snapshot in the project's root, which is the current directory."""
        names, own = list(declared), params == Path("params.yaml").resolve()
        entries = sorted({*_dependencies(Path("dvc.yaml"), stage), *(Path(entry).as_posix() for entry in inputs)})
        values = _values(params, names) if own else {}
        return cls(stage, str(params) if own else None, values, _code(entries), _data(entries), names, entries)

    def write(self) -> None:
        """Write the snapshot to the file that a flow asked for, if one did."""
        target = os.environ.get(VARIABLE)
        if target:
            write_atomic(Path(target), json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> InputSnapshot | None:
        """Return the snapshot of a step, or None if the stage is not one of this project's steps."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def changes(self, digests: Mapping[str, str] | None = None, root: Path = Path()) -> list[str]:
        """Return every difference from now, in words. `digests` excuses data that were rewritten with the same content."""
        found = self._params() if self.params else []
        found += _differences(self.code, _code(self.entries, root), "the code")
        now = _data(self.entries, root)
        moved = [entry for entry in self.entries if _below(self.data, entry) != _below(now, entry)]
        return found + [
            f"the data {entry} changed" for entry in moved if not _same(root / entry, (digests or {}).get(entry))
        ]

    def verify(self, digests: Mapping[str, str]) -> None:
        """Raise TrackingError if something changed since the snapshot."""
        found = self.changes(digests)
        if found:
            raise TrackingError(
                f"{self.stage}: {listed(found)} while the stage ran. DVC would record the new state for a result that was made"
                " with the old one, so nothing is recorded. Run `dvc repro` again: it uses the new state, or continues this"
                " run if you restore the old state first."
            )

    def _params(self) -> list[str]:
        """Return the parameters that changed."""
        try:
            now = _values(Path(str(self.params)), self.declared)
        except ConfigError as error:
            return [f"params.yaml became unreadable ({error})"]
        names = sorted(name for name in {*self.values, *now} if self.values.get(name) != now.get(name))
        return [f"{name} changed from {self.values.get(name)} to {now.get(name)} in params.yaml" for name in names]


def listed(found: list[str]) -> str:
    """Return the first differences as one phrase."""
    more = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _values(params: Path, prefixes: Iterable[str]) -> dict[str, Any]:
    """Return the flat values below the prefixes, as DVC reads them: without defaults."""
    flat = flatten(read_yaml(params))
    chosen = {name: value for name, value in flat.items() if any(f"{name}.".startswith(f"{p}.") for p in prefixes)}
    plain: dict[str, Any] = json.loads(json.dumps(representable(chosen), default=str))
    return plain


def _dependencies(graph: Path, stage: str) -> list[str]:
    """Return the dependencies of a stage in dvc.yaml whose path does not depend on a matrix."""
    stages = (read_yaml(graph) or {}).get("stages") or {} if graph.is_file() else {}
    declared = (stages.get(stage) or {}).get("deps") or ()
    return [str(entry) for entry in declared if "${" not in str(entry)]


def _is_code(entry: str) -> bool:
    return Path(entry).parts[0] in _CODE or entry.endswith(".py")


def _files(root: Path, entry: str) -> Iterator[Path]:
    """Yield the files of an entry that DVC hashes."""
    path = root / entry
    if path.is_file():
        yield path
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(folder, name) for name in names if not name.endswith(".pyc"))


def _each(entries: Iterable[str], root: Path, measure: Callable[[Path], Any]) -> dict[str, Any]:
    """Apply `measure` to every file, by name. A file that disappears meanwhile is left out, which counts as a change."""
    found = {}
    for entry in entries:
        for path in _files(root, entry):
            try:
                found[(Path(entry) / path.relative_to(root / entry)).as_posix()] = measure(path)
            except FileNotFoundError:
                continue
    return found


def _code(entries: Iterable[str], project: Path = Path()) -> dict[str, str]:
    """Return the hash of every file of code: of the project, or of the running packages if the project has none."""
    found: dict[str, str] = {}
    for entry in filter(_is_code, entries):
        root = project if (project / entry).exists() else SOURCES
        found |= _each([entry], root, file_digest)
    return found


def _data(entries: Iterable[str], root: Path = Path()) -> dict[str, list[int]]:
    """Return size, time of change and inode of every file of data: hashing large models again would take minutes."""

    def stamp(path: Path) -> list[int]:
        found = path.stat()
        return [found.st_size, found.st_mtime_ns, found.st_ino]

    return _each((entry for entry in entries if not _is_code(entry)), root, stamp)


def _below(stamps: Mapping[str, list[int]], entry: str) -> dict[str, list[int]]:
    """Return the stamps of one entry's files."""
    return {name: stamp for name, stamp in stamps.items() if f"{name}/".startswith(f"{entry.rstrip('/')}/")}


def _same(path: Path, digest: str | None) -> bool:
    """Return True if the content is still the one that was hashed at the start."""
    return digest is not None and path.exists() and content_digest(path) == digest


def _differences(before: Mapping[str, str], now: Mapping[str, str], kind: str) -> list[str]:
    """Return the names whose hash changed."""
    return [f"{kind} {name} changed" for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
