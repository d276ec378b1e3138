"""Back up and restore the three databases: Prefect's runs and schedules, MLflow's runs and registry, MLflow's accounts.

The S3 store and DVC's cache hold weights, data and artifacts; to copy them see docs/operations.md.
"""

from __future__ import annotations

from pathlib import Path

from infra.postgres import DATABASES, Postgres
from infra.processes import Processes
from posttrain.errors import OrchestrationError
from posttrain.files import replace, sync, write_atomic

USERS = ("worker", "prefect", "mlflow")
"""Processes that hold connections to the databases."""
NEW, COMPLETE = ".dump.new", "all-new-dumps-are-complete"
"""Ending of a dump that is being written, and the file that exists while all new dumps are complete and get their names."""


def backup(postgres: Postgres, folder: Path) -> list[Path]:
    """Write one dump per database and return their paths. Each dump is consistent, and nothing has to be stopped.

    A folder that holds a back-up keeps it until all new dumps are complete: a kill never leaves dumps of two back-ups.
    """
    folder.mkdir(parents=True, exist_ok=True)
    complete(folder)
    for name in DATABASES:
        path = folder.absolute() / f"{name}{NEW}"
        postgres.run([*postgres.client("pg_dump"), "--format=custom", "--dbname", name], output=path)
        sync(path)
    write_atomic(folder / COMPLETE, b"")
    complete(folder)
    return [folder.absolute() / f"{name}.dump" for name in DATABASES]


def complete(folder: Path) -> None:
    """Rename the new dumps of a back-up, if all of them are complete; also those of a killed one."""
    if not (folder / COMPLETE).is_file():
        return
    for name in DATABASES:
        if (folder / f"{name}{NEW}").is_file():
            replace(folder / f"{name}{NEW}", folder / f"{name}.dump")
    (folder / COMPLETE).unlink()
    sync(folder)


def restore(postgres: Postgres, processes: Processes, folder: Path) -> None:
    """Replace the databases by the dumps. Raises OrchestrationError if a dump is missing or damaged, or a server is running."""
    complete(folder)
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
