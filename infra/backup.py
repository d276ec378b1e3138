"""Back up and restore the three databases: Prefect's runs and schedules, MLflow's runs and registry, MLflow's accounts.

The S3 store and DVC's cache hold weights, data and artifacts; to copy them see docs/operations.md.
"""

from __future__ import annotations

from pathlib import Path

from infra.postgres import DATABASES, Postgres
from infra.processes import Processes
from posttrain.errors import OrchestrationError

USERS = ("worker", "prefect", "mlflow")
"""Processes that hold connections to the databases."""


def backup(postgres: Postgres, folder: Path) -> list[Path]:
    """Write one dump per database and return their paths. Each dump is consistent, and nothing has to be stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in DATABASES:
        path = folder.absolute() / f"{name}.dump"
        postgres.run([*postgres.client("pg_dump"), "--format=custom", "--dbname", name], output=path)
        written.append(path)
    return written


def restore(postgres: Postgres, processes: Processes, folder: Path) -> None:
    """Replace the databases by the dumps. Raises OrchestrationError if a dump is missing or damaged, or a server is running."""
    dumps = {name: folder.absolute() / f"{name}.dump" for name in DATABASES}
    missing = [str(path) for path in dumps.values() if not path.is_file()]
    if missing:
        raise OrchestrationError(f"no back-up to restore: {', '.join(missing)} not found; `backup` writes these files")
    running = [name for name in USERS if processes.pid(name) is not None]
    if running:
        raise OrchestrationError(
            f"{', '.join(running)} would write into a database during its replacement. Stop them first with"
            f" `python -m infra.servers stop {' '.join(running)}`"
        )
    # Read every dump first: a damaged one must not destroy the database that it should replace.
    for path in dumps.values():
        postgres.run(["pg_restore", "--list"], source=path)
    for name, path in dumps.items():
        postgres.run([*postgres.client("dropdb"), "--if-exists", "--force", name])
        postgres.run([*postgres.client("createdb"), name])
        postgres.run([*postgres.client("pg_restore"), "--exit-on-error", "--dbname", name], source=path)
