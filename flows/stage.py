"""Run one stage on a worker of a work pool. `flows.workers` starts workers; a flow sends stages if POSTTRAIN_POOL is set."""

from __future__ import annotations

from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run

from pipelines.config.yaml_files import read_yaml
from posttrain.errors import OrchestrationError
from tasks.pool.order import checked
from tasks.pool.settings import FLOW, read_settings
from tasks.pool.work import Worker, run_order

PRESENT: list[Worker] = []
"""The worker of this process, set by flows.stage_worker."""


@flow(name=FLOW, persist_result=False)
def stage(name: str, commit: str, files: dict[str, str], lock: str, parent: str = "") -> None:
    """Bring one stage of a commit up to date here and copy its results to DVC's remote; see tasks.pool.order."""
    if not PRESENT:
        raise OrchestrationError("a stage runs only in a worker that `python -m flows.workers add` started")
    (worker,) = PRESENT
    settings = read_settings(worker.workspace, read_yaml(worker.workspace / "dvc.yaml")["stages"])
    run_order(worker, checked(name, commit, files, lock), UUID(str(flow_run.get_id())), settings, parent)
