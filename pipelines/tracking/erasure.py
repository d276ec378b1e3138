"""Find and delete the MLflow traces that quote given texts, so that the bytes are gone from the database as well."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config.params import load_params
from pipelines.tracking.source import discover
from pipelines.tracking.store import ask, open_client, tracking_uri
from pipelines.tracking.traces import delete_traces, search, texts_of
from posttrain.errors import DataError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
_LOCKED_SECONDS = 60
FAILS = ("cannot be searched for traces", "Nothing was deleted. Correct it and run again.")


def find_traces(project: Path, quotes: Callable[[str], bool]) -> list[str]:
    """Return `experiment/trace` of each trace with a text for which `quotes` is true. Raises TrackingError if the store does not answer.

    All experiments of a database file are searched; on a server, which other projects may share, only this project's.
    """
    database = local_database(project)
    if database is not None and not database.is_file():
        return []
    client = open_client(project)
    return ask(client, partial(_find, client, project, quotes), *FAILS)


def erase_traces(project: Path, traces: Sequence[str]) -> None:
    """Delete traces. A database file is always rewritten, because SQLite only marks deleted rows as free space.

    Raises:
        TrackingError: the store does not answer.
        DataError: a different program keeps the file locked.
    """
    database = local_database(project)
    if database is not None and not database.is_file():
        return
    client = open_client(project)
    pairs = sorted(each.split("/", 1) for each in traces)
    for experiment, group in groupby(pairs, lambda pair: pair[0]):
        ask(client, partial(delete_traces, client, experiment, [name for _, name in group]), *FAILS)
    if database is not None:
        _rewrite(database)


def _find(client: MlflowClient, project: Path, quotes: Callable[[str], bool]) -> list[str]:
    searched = list(experiments(client, project))
    found = search(client, searched, None, spans=True) if searched else ()
    return [f"{each.info.experiment_id}/{each.info.trace_id}" for each in found if any(map(quotes, texts_of(each)))]


def experiments(client: MlflowClient, project: Path) -> Iterator[str]:
    """Yield the ids of the experiments to search."""
    from mlflow.entities import ViewType

    if local_database(project) is not None:
        yield from (str(each.experiment_id) for each in client.search_experiments(ViewType.ALL))
        return
    own = {str(source.surroundings().get("experiment") or "") for source in discover(project, [])}
    for name in sorted(own | {load_params(project / "params.yaml").project.experiment}):
        if name and (found := client.get_experiment_by_name(name)) is not None:
            yield str(found.experiment_id)


def local_database(project: Path) -> Path | None:
    """Return the database file that this project's MLflow uses, or None for a server."""
    uri = tracking_uri(project)
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def _rewrite(database: Path) -> None:
    """Rewrite a SQLite file without its free space, and empty its write-ahead log."""
    try:
        with closing(sqlite3.connect(database, timeout=_LOCKED_SECONDS)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.OperationalError as error:
        raise DataError(
            f"the traces are deleted, but their bytes may still be in free space of {database}: {error}. Stop the programs that use it,"
            " such as `posttrain ui`, and run again."
        ) from error
