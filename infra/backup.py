"""Back-up and restore of the three databases: Prefect's runs and schedules, MLflow's runs and registry, MLflow's accounts.

Weights, data and artifacts are in the S3 store and in DVC's cache, not here: copy those with the store's own means.
"""

from __future__ import annotations

from pathlib import Path

from infra.postgres import DATABASES, Postgres
from infra.processes import Processes
from posttrain.errors import OrchestrationError

USERS = ("worker", "prefect", "mlflow")
"""Processes that hold connections to the databases."""


def backup(postgres: Postgres, folder: Path) -> list[Path]:
    """One dump per database, consistent in itself; nothing need be stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in DATABASES:
        path = folder.absolute() / f"{name}.dump"
        postgres.run([*postgres.client("pg_dump"), "--format=custom", "--dbname", name], output=path)
        made.append(path)
    return made


def restore(postgres: Postgres, processes: Processes, folder: Path) -> None:
    """Replace the databases by the dumps. Raises OrchestrationError where one is missing or torn, or a server still runs."""
    dumps = {name: folder.absolute() / f"{name}.dump" for name in DATABASES}
    missing = [str(path) for path in dumps.values() if not path.is_file()]
    if missing:
        raise OrchestrationError(f"no back-up to restore: {', '.join(missing)} not found; `backup` writes these files")
    running = [name for name in USERS if processes.pid(name) is not None]
    if running:
        raise OrchestrationError(
            f"{', '.join(running)} would write into a database that is being replaced: stop them first with"
            f" `python -m infra.servers stop {' '.join(running)}`"
        )
    for path in dumps.values():  # a dump that cannot be read must not cost the database that it was to replace
        postgres.run(["pg_restore", "--list"], source=path)
    for name, path in dumps.items():
        postgres.run([*postgres.client("dropdb"), "--if-exists", "--force", name])
        postgres.run([*postgres.client("createdb"), name])
        postgres.run([*postgres.client("pg_restore"), "--exit-on-error", "--dbname", name], source=path)
