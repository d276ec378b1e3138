"""Correct the addresses of artifacts in the project's own mlflow.db after its folder was renamed, moved or copied.

MLflow stores the absolute address of every run's artifacts. In a moved project, earlier artifacts could not be found, and new ones would be
written to the old folder.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlparse

ARTIFACTS = "mlartifacts"
_COLUMNS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


def relocate_artifacts(project: Path, database: Path) -> int:
    """Replace the address of a former project folder in the database by this one's, and return the number of changed entries.

    Only addresses below a folder `mlartifacts` are replaced, and only if that folder is in this project or no longer elsewhere. A locked
    database is left as it is: the next command tries again.
    """
    if not database.is_file():
        return 0
    own = (project / ARTIFACTS).absolute().as_uri()
    try:
        with closing(sqlite3.connect(database)) as connection, connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "experiments" not in tables:
                return 0
            found = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
            former = [str(place) for (place,) in found if _is_former(str(place), own, project)]
            return sum(
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (own, len(place) + 1, place, len(place) + 1, f"{place}/"),
                ).rowcount
                for place in former
                for table, column in _COLUMNS
                if table in tables
            )
    except sqlite3.OperationalError:
        return 0


def _is_former(place: str, own: str, project: Path) -> bool:
    if place == own or not place.startswith("file://") or not place.endswith(f"/{ARTIFACTS}"):
        return False
    return (project / ARTIFACTS).is_dir() or not Path(unquote(urlparse(place).path)).is_dir()
