"""Open the tracking store, and limit the time of one call to it."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipelines.runtime import environment
from pipelines.runtime.process import Lock
from pipelines.runtime.redaction import redact
from pipelines.tracking.relocation import ARTIFACTS, relocate_artifacts
from posttrain.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")
DATABASE = "mlflow.db"
_LARGE_BYTES = 100_000_000
SECONDS = 60.0
"""Longest time of one call to a tracking server."""
_IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Alembic would log each of its migrations when the database is created.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def tracking_uri(project: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or a SQLite database in the project's root.

    Raises TrackingError if the root's path cannot be part of an address.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given and "?" in str(project):
        raise TrackingError(
            f"{project}: the path contains '?', which would start the options of a database address. Rename the folder,"
            " or set MLFLOW_TRACKING_URI."
        )
    return given or f"sqlite:///{project / DATABASE}"


def refuse_damaged(uri: str) -> None:
    """Raise TrackingError if the address names a SQLite file that is cut, zeroed or no database. A locked one is left to MLflow."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.is_file():
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            found = str(database.execute(f"PRAGMA {_check(path)}").fetchone()[0])
    except sqlite3.OperationalError:
        return
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok" and not found.isdecimal():
        raise TrackingError(_damaged(path, found.splitlines()[-1]))


def _check(path: Path) -> str:
    """Return the pragma that reads the whole file, or only its schema if it is large."""
    return "quick_check(1)" if path.stat().st_size < _LARGE_BYTES else "schema_version"


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path} is damaged ({reason}), as after a power cut or a full disk, and is not used. Restore it from a back-up. Without one, move"
        f" it away: `mv {path} {path}.damaged`; then `posttrain sync` copies every run from the journals, and `python -m flows.promote"
        " --adopt` registers the weights in models/champion. Other versions and aliases were only in that file."
    )


def artifact_root(project: Path) -> Path:
    """Return the folder of local artifacts."""
    return project / ARTIFACTS


def open_client(project: Path) -> MlflowClient:
    """Return a client whose calls fail at once if the server is down; the journal is copied later."""
    environment.quiet()
    for name, value in _IMPATIENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # it would log the traceback of a locked or full database, which our errors report in words
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    uri = tracking_uri(project)
    refuse_damaged(uri)
    if uri == f"sqlite:///{project / DATABASE}" and relocate_artifacts(project, project / DATABASE):
        print(
            f"mlflow: the project's folder has moved; the addresses of its artifacts in {DATABASE} are corrected",
            flush=True,
        )
    try:
        create_database(project)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, ValueError) as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI = {redact(uri)}: not an address that MLflow accepts. Set it to http://HOST:PORT or a"
            " database's address, or unset it"
            " for a file in the project."
        ) from error
    except SQLAlchemyError as error:
        if uri.startswith("sqlite:///") and "already exists" in str(
            error
        ):  # a part of the tables, from a creation that did not end
            raise TrackingError(_damaged(Path(uri.removeprefix("sqlite:///")), _first_line(error))) from error
        raise TrackingError(
            f"MLflow's database {redact(uri)} cannot be opened: {redact(_first_line(error))}. Free space if its disk is full, give this"
            " user the right to read and write it and its folder, or correct MLFLOW_TRACKING_URI. Nothing is lost: the journals"
            " hold every value."
        ) from error


def create_database(project: Path) -> None:
    """Create the project's own MLflow database if it is missing, in a new file that gets its name once it has all tables.

    Steps that end at the same time would otherwise create the tables at once, and a killed one would leave a part of them.
    """
    path = project / DATABASE
    if path.exists() or tracking_uri(project) != f"sqlite:///{path}":
        return
    from mlflow import MlflowClient

    with Lock(project / ".posttrain" / "mlflow.lock"):
        if path.exists():
            return
        fresh = path.with_name(f"{DATABASE}.new")
        fresh.unlink(missing_ok=True)
        address = f"sqlite:///{fresh}"
        MlflowClient(tracking_uri=address, registry_uri=address)
        fresh.rename(path)


def experiment_id(client: MlflowClient, name: str, project: Path) -> str:
    """Return the id of the experiment with that name, and create it if necessary."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if _remote(client) else artifact_root(project).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # A different follower has created it in the meantime.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {name!r} was deleted. Restore it with `mlflow experiments restore -x"
            f" {found.experiment_id}`, or set project.experiment in params.yaml to a different name."
        )
    return str(found.experiment_id)


def _remote(client: MlflowClient) -> bool:
    """Return True if the store is a server."""
    return str(client.tracking_uri).startswith(("http://", "https://"))


def workspace(project: Path) -> str:
    """Return an opaque name of this checkout on this machine; only its own runs may be ended as stale."""
    return hashlib.sha256(f"{platform.node()}:{project.resolve()}".encode()).hexdigest()[:16]


def ask(client: MlflowClient, call: Callable[[], T], problem: str, advice: str) -> T:
    """Return the result of the call; convert any error of the store into TrackingError with the store, `problem`, reason and `advice`."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return _within(SECONDS, call) if _remote(client) else call()
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        refuse_damaged(str(client.tracking_uri))
        raise TrackingError(
            f"MLflow at {redact(str(client.tracking_uri))} {problem}: {redact(_first_line(error))}. {advice}"
        ) from error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return the result of the call. Raises TimeoutError after `seconds`: the limit of requests is one for each byte."""
    done = Future[T]()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="mlflow", daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():
            raise
        raise TimeoutError(f"no whole answer within {seconds:g} s") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
