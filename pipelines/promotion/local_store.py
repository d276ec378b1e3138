"""Read the registry's versions from a local SQLite store without importing MLflow, which takes longer than the question."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from pipelines.promotion.registry import ALIASES, MD5, Version
from pipelines.tracking.store import tracking_uri

_PREFIX = "sqlite:///"
_VERSIONS = (
    "SELECT version FROM model_versions WHERE name = ? AND current_stage != 'Deleted_Internal' ORDER BY version DESC"
)
_TAGS = "SELECT version, key, value FROM model_version_tags WHERE name = ?"
_ALIASES = "SELECT alias, version FROM registered_model_aliases WHERE name = ?"


def read_versions(project: Path, name: str) -> list[Version] | None:
    """Return the versions of a registered model, newest first, as `Registry.versions` does.

    Without a store there are none. Returns None if the store is not a SQLite file with MLflow's tables of today: then ask MLflow.
    """
    uri = tracking_uri(project)
    path = Path(uri.removeprefix(_PREFIX))
    if not uri.startswith(_PREFIX) or "?" in uri:
        return None
    if not path.is_file():
        return []
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            numbers = [int(row[0]) for row in database.execute(_VERSIONS, (name,))]
            tags: dict[int, dict[str, str]] = {number: {} for number in numbers}
            for number, key, value in database.execute(_TAGS, (name,)):
                if number in tags:
                    tags[number][key] = value
            aliases = {str(alias): int(number) for alias, number in database.execute(_ALIASES, (name,))}
    except sqlite3.Error:
        return None
    found = [
        Version(number, tags[number], tuple(alias for alias in ALIASES if aliases.get(alias) == number))
        for number in numbers
    ]
    return found if all(MD5 in version.tags for version in found) else None
