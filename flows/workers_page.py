"""Show a pool's workers: the present stage and the recent times of each, and the stages that wait."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.types._datetime import now

from posttrain.errors import OrchestrationError
from tasks.pool.record import TYPE, Record, parse

LATELY = 200
"""Stages, the latest, whose times are added up."""
PHASES = ("running", "fetching", "waiting", "sending")


def overview(pool: str) -> str:
    """Return one line a worker, one a stage at work, and the number of stages that wait. Raises OrchestrationError without the pool."""
    with get_client(sync_client=True) as client:
        try:
            workers = client.read_workers_for_work_pool(pool)
        except ObjectNotFound:
            raise OrchestrationError(
                f"there is no pool {pool!r} on this server yet; `python -m flows.workers add {pool}` adds a worker."
            ) from None
        waiting = client.count_flow_runs(
            deployment_filter=_stages(pool), flow_run_filter=_in_states(StateType.SCHEDULED)
        )
        lately = _runs(client, pool, StateType.COMPLETED, StateType.RUNNING, StateType.FAILED, StateType.CRASHED)
        records = _records(client, lately)
    lines = [
        f"{'worker':<28} {'state':<9} {'seen':>7}  {'stages':>6} "
        + " ".join(f"{phase:>9}" for phase in (*PHASES, "idle"))
    ]
    for worker in sorted(workers, key=lambda each: each.name):
        own = [(run, records[run.id]) for run in lately if run.id in records and records[run.id].worker == worker.name]
        state = worker.status.value.lower() if worker.status else "unknown"
        times = " ".join(f"{seconds:>7.1f} s" for seconds in _times(own, now("UTC")))
        lines.append(f"{worker.name:<28} {state:<9} {_ago(worker.last_heartbeat_time):>7}  {len(own):>6} {times}")
    for run in lately:
        record = records.get(run.id)
        if run.state_type == StateType.RUNNING and record is not None:
            lines.append(f"  {run.name:<26} {record.phase} on {record.worker}")
    return "\n".join([*lines, f"waiting stages: {waiting}"])


def _times(stages: Sequence[tuple[FlowRun, Record]], moment: datetime) -> list[float]:
    """Return the seconds of each phase, and those since the first stage's start in which no stage was at work."""
    spent = dict.fromkeys(PHASES, 0.0)
    for run, record in stages:
        for phase in PHASES:
            spent[phase] += record.seconds.get(phase, 0.0)
        if run.state_type == StateType.RUNNING and record.phase in spent and run.start_time is not None:
            present = (moment - run.start_time).total_seconds() - sum(record.seconds.values())
            spent[record.phase] += max(0.0, present)
    began = [run.start_time for run, _ in stages if run.start_time is not None]
    passed = (moment - min(began)).total_seconds() if began else 0.0
    return [*spent.values(), max(0.0, passed - sum(spent.values()))]


def _runs(client: SyncPrefectClient, pool: str, *states: StateType) -> list[FlowRun]:
    return client.read_flow_runs(
        deployment_filter=_stages(pool),
        flow_run_filter=_in_states(*states),
        sort=FlowRunSort.START_TIME_DESC,
        limit=LATELY,
    )


def _stages(pool: str) -> DeploymentFilter:
    return DeploymentFilter(name=DeploymentFilterName(any_=[pool]))


def _in_states(*states: StateType) -> FlowRunFilter:
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))))


def _records(client: SyncPrefectClient, runs: list[FlowRun]) -> dict[object, Record]:
    """Return the workers' records of flow runs, by the run's id."""
    wanted = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[run.id for run in runs]), type=ArtifactFilterType(any_=[TYPE])
    )
    found = {each.flow_run_id: parse(each.data) for each in client.read_artifacts(artifact_filter=wanted, limit=LATELY)}
    return {run: record for run, record in found.items() if record is not None}


def _ago(moment: datetime | None) -> str:
    return "never" if moment is None else f"{(now('UTC') - moment).total_seconds():.0f} s"
