"""Run one stage on a worker of a work pool. `flows.workers` starts workers; a flow sends stages if POSTTRAIN_POOL is set."""

from __future__ import annotations

import threading
from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run

from pipelines.config.yaml_files import read_yaml
from tasks.pool.order import checked
from tasks.pool.settings import FLOW, read_settings
from tasks.pool.work import Worker, run_order
from tasks.slots import machine_slots

PRESENT: list[Worker] = []
"""The worker of this process; without one, as in a container for one flow run, the project's folder is its clone."""


@flow(name=FLOW, persist_result=False)
def stage(name: str, commit: str, files: dict[str, str], lock: str, parent: str = "") -> None:
    """Bring one stage of a commit up to date here and copy its results to DVC's remote; see tasks.pool.order."""
    order = checked(name, commit, files, lock)
    worker = PRESENT[0] if PRESENT else Worker(
        str(flow_run.get_name()), Path.cwd(), len(machine_slots()), threading.Event()
    )  # fmt: skip
    settings = read_settings(worker.workspace, read_yaml(worker.workspace / "dvc.yaml")["stages"])
    run_order(worker, order, UUID(str(flow_run.get_id())), settings, parent)
