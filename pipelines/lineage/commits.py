"""Find the git commit that was checked out when a stage ran.

A run records it in its measurements, which stay on the machine, and MLflow has it as a tag. It is no part of the journal: the same
stage of two commits with the same code gives the same bytes. If a finished run was made again, the first one counts: later stages read
its bytes.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.runtime import environment
from pipelines.runtime.context import MEASUREMENTS
from pipelines.runtime.journal import read
from pipelines.tracking.describe import RUN_TAG
from pipelines.tracking.store import ask, open_client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

COMMIT_TAG = "mlflow.source.git.commit"
_SQLITE = "sqlite:///"
_QUERY = (
    "SELECT start_time, found.value FROM tags AS run JOIN tags AS found USING (run_uuid) JOIN runs USING (run_uuid)"
    " WHERE run.key = ? AND run.value = ? AND found.key = ? AND runs.lifecycle_stage = 'active'"
    " ORDER BY status <> 'FINISHED', start_time, run_uuid"
)
_IDENTITY = re.compile(r"[\w.-]+")


def commit_of(project: Path, identity: str) -> str | None:
    """Return the commit of a run by its identity, such as `sft-a689d7d4112fa11e`; None if nothing here recorded one.

    Of a run that was continued, it is the commit at the end. MLflow's server is asked only if the measurements are not on this machine.
    Raises TrackingError if it does not respond then.
    """
    if not _IDENTITY.fullmatch(identity):
        return None
    measured = environment.states(project) / identity / MEASUREMENTS
    starts = [record for record in read(measured) if record["kind"] == "start"] if measured.is_file() else []
    commit = next((str(record["commit"]) for record in reversed(starts) if record.get("commit")), None)
    if commit is not None and not tracking_uri(project).startswith(_SQLITE):
        return commit
    started, tracked = _tracked(project, identity) or (0, None)
    is_first = commit is None or (tracked is not None and started < int(starts[0]["time"] * 1000))
    return tracked if is_first else commit


def _tracked(project: Path, identity: str) -> tuple[int, str] | None:
    """Return the start of the first finished run of that identity in MLflow, in milliseconds since the epoch, and its commit."""
    uri = tracking_uri(project)
    if not uri.startswith(_SQLITE):
        client = open_client(project)
        return ask(
            client, partial(_search, client, identity), "cannot be asked for commits", "Start it, and type this again."
        )
    path = Path(uri.removeprefix(_SQLITE))
    if not path.is_file():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute(_QUERY, (RUN_TAG, identity, COMMIT_TAG)).fetchone()
    except sqlite3.Error:  # tables of a different version of MLflow
        return None
    return None if found is None else (int(found[0] or 0), str(found[1]))


def _search(client: MlflowClient, identity: str) -> tuple[int, str] | None:
    experiments = [str(each.experiment_id) for each in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{identity}'", order_by=["attributes.start_time ASC"])
    runs = [run for run in runs if COMMIT_TAG in run.data.tags]
    first = next((run for run in runs if run.info.status == "FINISHED"), next(iter(runs), None))
    return None if first is None else (int(first.info.start_time or 0), first.data.tags[COMMIT_TAG])
