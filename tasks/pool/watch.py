"""Follow the flow runs of all stages that were sent: two requests a second to Prefect, however many there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import State

from tasks.background import in_background
from tasks.pool.record import TYPE, Record, parse

POLL_SECONDS = 1.0
PAGE = 200
"""Most objects that Prefect's server returns at once."""


@dataclass
class Sight:
    """Present knowledge of one flow run."""

    state: State[Any] | None = None
    record: Record | None = None
    silent_seconds: float = 0.0
    """Time, by this machine's monotonic clock, in which the run was taken by a worker and nothing of it changed."""
    news: threading.Event = field(default_factory=threading.Event)

    def update(self, state: State[Any] | None, record: Record | None, passed: float) -> None:
        """Take in the server's present state, `passed` seconds after the look before."""
        waiting = state is None or state.is_scheduled()
        same = not waiting and _mark(state, record) == _mark(self.state, self.record)
        self.silent_seconds = self.silent_seconds + passed if same else 0.0
        self.state, self.record = state, record
        self.news.set()


def _mark(state: State[Any] | None, record: Record | None) -> tuple[object, ...]:
    return (state.type if state else None, record.beat if record else None, record.phase if record else None)


class Watch:
    """One thread that looks at all flow runs; `add` and `remove` are called by the stages' threads."""

    def __init__(self) -> None:
        self._sights: dict[UUID, Sight] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look every second while inside."""
        with in_background(self._run):
            yield

    def add(self, run: UUID) -> Sight:
        """Begin to follow a flow run."""
        return self._sights.setdefault(run, Sight())

    def remove(self, run: UUID) -> None:
        """Follow a flow run no longer."""
        self._sights.pop(run, None)

    def _run(self, over: threading.Event) -> None:
        before = time.monotonic()
        with get_client(httpx_settings={"timeout": 10.0}, sync_client=True) as client:
            while not over.wait(POLL_SECONDS):
                try:
                    self._look(client, min(time.monotonic() - before, 2 * POLL_SECONDS))
                except httpx.HTTPError:  # the server is away, which is no worker's silence
                    continue
                finally:
                    before = time.monotonic()

    def _look(self, client: SyncPrefectClient, passed: float) -> None:
        present = list(self._sights.items())
        for start in range(0, len(present), PAGE):
            page = dict(present[start : start + PAGE])
            ids = list(page)
            found = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=ids)), limit=PAGE)
            artifacts = client.read_artifacts(
                artifact_filter=ArtifactFilter(
                    flow_run_id=ArtifactFilterFlowRunId(any_=ids), type=ArtifactFilterType(any_=[TYPE])
                ),
                limit=PAGE,
            )
            records = {each.flow_run_id: parse(each.data) for each in artifacts}
            for run in found:
                page[run.id].update(run.state, records.get(run.id), passed)
