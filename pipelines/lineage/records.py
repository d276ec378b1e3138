"""Read DVC's records of finished stages: the run cache, dvc.lock, and the objects in the local cache.

DVC writes one record per stage run to `.dvc/cache/runs`: command, parameters, and the MD5 of every input and output. Together the records
connect any model of this checkout with the tables that it was trained on, also after newer runs have replaced it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.config.yaml_files import parse_written
from pipelines.tracking.lockfile import read_dvc_config, read_lock
from posttrain.files import read_json, write_atomic

REMOVE = "Remove this object of DVC's cache; `dvc pull` or `dvc repro` brings it back."

PARSED = Path(".posttrain/lineage.json")
PRODUCTS = ("data/", "models/", "runs/", "report")
"""Starts of the paths of data and results; the other inputs of a stage are code."""
TABLES = ("data/tables", "data/valid", "data/quarantine", "runs/reward_readers/artifacts")
"""Output folders whose files are inputs of later stages."""


class Artifact(NamedTuple):
    """One file or folder in one state. The MD5 of a folder ends with `.dir`, as DVC writes it."""

    path: str
    md5: str


@dataclass(frozen=True)
class StageRecord:
    """One finished run of a stage."""

    command: str
    inputs: tuple[Artifact, ...]
    outputs: tuple[Artifact, ...]
    params: Mapping[str, Any] = field(compare=False)

    @property
    def stage(self) -> str:
        """Return the stage and its arguments: `align --algorithm dpo --seed 0`."""
        return self.command.removeprefix("python -m pipelines.")

    def output(self, path: str) -> Artifact | None:
        """Return one output by its path."""
        return next((each for each in self.outputs if each.path == path), None)

    def journal(self) -> Artifact | None:
        """Return the run's journal."""
        return next((each for each in self.outputs if each.path.endswith("/journal.jsonl")), None)


@dataclass(frozen=True)
class Cache:
    """DVC's local cache. It may lack an object, e.g. after `dvc gc` or before `dvc pull`."""

    folder: Path
    parsed: Path | None = None
    """Where parsed entries of the run cache are kept; None keeps none."""

    def file(self, md5: str) -> Path | None:
        """Return the path of an object, or None if the cache does not have it."""
        path = self.folder / "files" / "md5" / md5[:2] / md5[2:]
        return path if path.is_file() else None

    def listing(self, folder: Artifact) -> list[Artifact] | None:
        """Return the files of a folder, or None if the cache does not have its listing."""
        path = self.file(folder.md5)
        if path is None:
            return None
        entries = read_json(path, REMOVE)
        return [Artifact(f"{folder.path}/{entry['relpath']}", entry["md5"]) for entry in entries]

    def records(self) -> Iterator[StageRecord]:
        """Yield the record of every stage run that this cache remembers."""
        for entry in self._entries().values():
            yield from _record(entry)

    def _entries(self) -> dict[str, Any]:
        """Return the entries of the run cache by path. DVC names them by their content, so each is parsed once and then kept as JSON."""
        runs = self.folder / "runs"
        paths = {path.relative_to(runs).as_posix(): path for path in sorted(runs.glob("??/*/*")) if path.is_file()}
        known = _read_parsed(self.parsed)
        entries = {name: known[name] if name in known else _parse(path) for name, path in paths.items()}
        if self.parsed is not None and entries.keys() != known.keys():
            write_atomic(self.parsed, json.dumps(entries).encode())
        return entries


def open_cache(project: Path) -> Cache:
    """Return the cache that `.dvc/config` names, `.dvc/cache` if it names none."""
    parser = read_dvc_config(project)
    folder = project / ".dvc" / parser.get("cache", "dir", fallback="cache").strip("'\"")
    return Cache(folder, project / PARSED)


def read_records(project: Path) -> list[StageRecord]:
    """Return the records of dvc.lock and of the run cache, each once; those of dvc.lock first.

    Raises TrackingError if dvc.lock is damaged.
    """
    current = [found for stage in read_lock(project).values() for found in _record(stage)]
    return list(dict.fromkeys([*current, *open_cache(project).records()]))


def _record(entry: Any) -> Iterator[StageRecord]:
    """Yield the record of one entry of dvc.lock or of the run cache, if it describes a stage of this project."""
    if not isinstance(entry, dict) or not str(entry.get("cmd", "")).startswith("python -m pipelines."):
        return
    params: dict[str, Any] = {}
    for values in (entry.get("params") or {}).values():
        params |= values
    yield StageRecord(str(entry["cmd"]), _artifacts(entry, "deps"), _artifacts(entry, "outs"), params)


def _parse(path: Path) -> Any:
    """Return an entry without dependencies on code, which are most of it."""
    entry = parse_written(path.read_text(encoding="utf-8"))
    if isinstance(entry, dict):
        entry["deps"] = [each for each in entry.get("deps") or () if str(each.get("path")).startswith(PRODUCTS)]
    return entry


def _read_parsed(path: Path | None) -> dict[str, Any]:
    """Return kept entries; none if they cannot be read, since they are parsed again then."""
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _artifacts(entry: Mapping[str, Any], key: str) -> tuple[Artifact, ...]:
    return tuple(
        Artifact(str(each["path"]), str(each["md5"]))
        for each in entry.get(key) or ()
        if "md5" in each and (key == "outs" or str(each["path"]).startswith(PRODUCTS))
    )
