"""Which tracking store is used, and how long one call to it may take."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipelines.runtime import environment
from pipelines.runtime.redaction import redact
from posttrain.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")
_IMPATIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    # Alembic tells about every one of its migrations when the database is made.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def tracking_uri(project: Path) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite database in the project's root. Raises TrackingError for a root that no address can name."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given and "?" in str(project):
        raise TrackingError(
            f"{project} holds a '?', which begins the options of a database's address: rename the folder, or set MLFLOW_TRACKING_URI."
        )
    return given or f"sqlite:///{project / 'mlflow.db'}"


def artifact_root(project: Path) -> Path:
    return project / "mlartifacts"


def open_client(project: Path) -> MlflowClient:
    """A client whose calls fail at once when the server is down: the journal makes up for it later."""
    environment.quiet()
    for name, value in _IMPATIENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(project)
    try:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, ValueError) as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI = {redact(uri)}: MLflow knows no such store; it is http://HOST:PORT, a database's address, or unset"
            " for a file in the project."
        ) from error


def experiment_id(client: MlflowClient, name: str, project: Path) -> str:
    """The experiment of that name, made if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if _remote(client) else artifact_root(project).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            # Another follower was faster.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {name!r} was deleted. Restore it with `mlflow experiments restore -x"
            f" {found.experiment_id}`, or choose another name under project.experiment in params.yaml."
        )
    return str(found.experiment_id)


def _remote(client: MlflowClient) -> bool:
    return str(client.tracking_uri).startswith(("http://", "https://"))


def workspace(project: Path) -> str:
    """An opaque name of this checkout on this machine: whose processes we may call dead."""
    return hashlib.sha256(f"{platform.node()}:{project.resolve()}".encode()).hexdigest()[:16]


def ask(client: MlflowClient, call: Callable[[], T], problem: str, advice: str) -> T:
    """The call's answer. Whatever a store raises becomes one TrackingError: which store, `problem`, its reason, `advice`."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return call()
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise TrackingError(
            f"MLflow at {redact(str(client.tracking_uri))} {problem}: {redact(reason)}. {advice}"
        ) from error
