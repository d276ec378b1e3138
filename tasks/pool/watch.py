"""Follow the flow runs of all stages that were sent: two requests for each 200 of them, and only those that a worker has taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType, WorkerStatus

from tasks.pool.record import TYPE, Record, parse

PAGE = 200
"""Most objects that Prefect's server returns at once."""
_TAKEN = [each for each in StateType if each != StateType.SCHEDULED]


@dataclass
class Sight:
    """Present knowledge of one flow run."""

    state: State[Any] | None = None
    """None while no worker has taken the run. A run with a record is not asked for its state any more."""
    record: Record | None = None
    silent_seconds: float = 0.0
    """Time, by this machine's monotonic clock, in which the run was taken by a worker and nothing of it changed."""
    deleted: bool = False
    """True if the server does not have the run any more."""

    @property
    def waits(self) -> bool:
        """Return True if no worker has taken the run yet, as far as is known."""
        return self.record is None and self.state is None

    def update(self, state: State[Any] | None, record: Record | None, passed: float) -> None:
        """Take in the server's present state, `passed` seconds after the look before."""
        waiting = record is None and (state is None or state.is_scheduled())
        same = not waiting and _mark(state, record) == _mark(self.state, self.record)
        self.silent_seconds = self.silent_seconds + passed if same else 0.0
        self.state, self.record = state, record


def _mark(state: State[Any] | None, record: Record | None) -> tuple[object, ...]:
    """Return the values that change while a worker is alive: those of its record, or the state until it has one."""
    return (record.beat, record.phase) if record else (state.type if state else None,)


def look(client: SyncPrefectClient, sights: Mapping[UUID, Sight], passed: float) -> None:
    """Bring the knowledge of all flow runs up to date. A waiting run is not returned by the server, since its parameters are long.

    States come first: a worker makes its record before its run ends, so a run that has ended by then has its record a moment later.
    """
    present = list(sights)
    for start in range(0, len(present), PAGE):
        ids = present[start : start + PAGE]
        unreported = [run for run in ids if sights[run].record is None]
        states = _states(client, unreported) if unreported else {}
        records = _records(client, ids)
        for run in ids:
            sights[run].update(states.get(run), records.get(run), passed)


def _records(client: SyncPrefectClient, ids: list[UUID]) -> dict[UUID, Record]:
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=ids), type=ArtifactFilterType(any_=[TYPE]))
    found = client.read_artifacts(artifact_filter=wanted, limit=PAGE)
    records = {each.flow_run_id: parse(each.data) for each in found}
    return {run: record for run, record in records.items() if run is not None and record is not None}


def _states(client: SyncPrefectClient, ids: list[UUID]) -> dict[UUID, State[Any] | None]:
    """Return the states of those runs that a worker has taken, or that have ended."""
    taken = FlowRunFilterState(type=FlowRunFilterStateType(any_=_TAKEN))
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=ids), state=taken), limit=PAGE)
    return {run.id: run.state for run in found}


def deleted(client: SyncPrefectClient, sights: Mapping[UUID, Sight]) -> list[UUID]:
    """Return those runs, of the ones that seem to wait for a worker, that the server does not have any more."""
    waiting = [run for run, sight in sights.items() if sight.waits]
    gone: list[UUID] = []
    for start in range(0, len(waiting), PAGE):
        ids = waiting[start : start + PAGE]
        asked = FlowRunFilter(id=FlowRunFilterId(any_=ids))
        if client.count_flow_runs(flow_run_filter=asked) < len(ids):
            found = {run.id for run in client.read_flow_runs(flow_run_filter=asked, limit=PAGE)}
            gone += [run for run in ids if run not in found]
    return gone


def online_workers(client: SyncPrefectClient, pool: str) -> list[str]:
    """Return the names of the pool's workers that report to Prefect's server."""
    return sorted(each.name for each in client.read_workers_for_work_pool(pool) if each.status == WorkerStatus.ONLINE)
