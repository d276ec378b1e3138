"""Read DVC's records of finished stages: the run cache, dvc.lock, and the objects in the local cache.

DVC writes one record per stage run to `.dvc/cache/runs`: command, parameters, and the MD5 of every input and output. Together the records
connect any model of this checkout with the tables that it was trained on, also after newer runs have replaced it.
"""

from __future__ import annotations

import configparser
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.config.params import read_yaml
from pipelines.tracking.lockfile import read_lock

PRODUCTS = ("data/", "models/", "runs/", "report")
"""Starts of the paths of data and results; the other inputs of a stage are code."""
TABLES = ("data/tables", "data/valid", "data/quarantine")
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

    def file(self, md5: str) -> Path | None:
        """Return the path of an object, or None if the cache does not have it."""
        path = self.folder / "files" / "md5" / md5[:2] / md5[2:]
        return path if path.is_file() else None

    def listing(self, folder: Artifact) -> list[Artifact] | None:
        """Return the files of a folder, or None if the cache does not have its listing."""
        path = self.file(folder.md5)
        if path is None:
            return None
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [Artifact(f"{folder.path}/{entry['relpath']}", entry["md5"]) for entry in entries]

    def records(self) -> Iterator[StageRecord]:
        """Yield the record of every stage run that this cache remembers."""
        for path in sorted((self.folder / "runs").glob("??/*/*")):
            if path.is_file():
                yield from _record(read_yaml(path))


def open_cache(project: Path) -> Cache:
    """Return the cache that `.dvc/config` names, `.dvc/cache` if it names none."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read([project / ".dvc" / "config", project / ".dvc" / "config.local"], encoding="utf-8")
    return Cache(project / ".dvc" / parser.get("cache", "dir", fallback="cache").strip("'\""))


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


def _artifacts(entry: Mapping[str, Any], key: str) -> tuple[Artifact, ...]:
    return tuple(
        Artifact(str(each["path"]), str(each["md5"]))
        for each in entry.get(key) or ()
        if "md5" in each and (key == "outs" or str(each["path"]).startswith(PRODUCTS))
    )
