"""End flow runs that a killed worker, or `make serve`, had claimed and whose process never reached its flow.

Such a run stays Pending: it writes no `.posttrain/flow.run`, sends no heartbeats, and keeps the only place of its queue, so no later
night would run.
"""

from __future__ import annotations

from collections.abc import Collection

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.states import Crashed

from flows.hooks import notify_end
from tasks.console import print_line

PENDING = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING])))


def end_unstarted(names: Collection[str], *, pool: str | None = None, worker: str = "") -> list[FlowRun]:
    """Mark the Pending runs of these deployments Crashed, notify the webhook, and return them.

    Call it before this process claims its first run. With a work pool, nothing is done while a different worker than `worker` polls it:
    the runs may be that one's.
    """
    deployments = DeploymentFilter(name=DeploymentFilterName(any_=sorted(names)))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=PENDING, deployment_filter=deployments)
        ended = [run for run in runs if run.work_pool_name == pool]
        if ended and pool is not None and _others(client, pool, worker):
            return []
        for run in ended:
            state: State[None] = Crashed(
                message="Its process was killed before the flow began; the next run does its work."
            )
            client.set_flow_run_state(run.id, state, force=True)
            print_line(f"flow run {run.name} was killed before it began, and is now marked Crashed")
            notify_end(client.read_flow(run.flow_id).name, run, state)
    return ended


def _others(client: SyncPrefectClient, pool: str, worker: str) -> bool:
    """Return True if a worker of a different name polls the pool."""
    workers = client.read_workers_for_work_pool(pool)
    return any(each.name != worker and each.status == WorkerStatus.ONLINE for each in workers)
