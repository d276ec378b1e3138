"""A worker's record of one stage in Prefect: an artifact of the flow run that counts its reports and, at the end, holds the result.

The flow that sent the stage reads it. A record whose count stands still for `lease_seconds` belongs to a worker that is gone; only the
reader's own clock measures that, so clocks of other machines do not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from uuid import UUID

import httpx
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.exceptions import ObjectNotFound

from posttrain.errors import Interrupted
from tasks.background import in_background
from tasks.log import StageOutcome
from tasks.pool.requests import insist, own_retries, prefect_client

TYPE = "posttrain-stage"
"""Type of the artifact."""
Phase = Literal["fetching", "waiting", "running", "sending", "done", "failed", "lost"]
"""`failed`: the stage itself; `lost`: the worker could not run it, a different one may."""


@dataclass
class Record:
    """A worker's report about a stage."""

    worker: str
    beat: int = 0
    phase: Phase = "fetching"
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds in each finished phase."""
    checkpoint: str = ""
    """Name of the newest checkpoint in the remote."""
    outcome: StageOutcome = "ran"
    entry: str = ""
    """The stage's entry of dvc.lock, when done."""
    error: str = ""

    @property
    def ended(self) -> bool:
        """Return True if the worker reports nothing more."""
        return self.phase in ("done", "failed", "lost")


def parse(data: Any) -> Record | None:
    """Return the record in an artifact's data, or None if it is not one: whoever has the server's password can write there."""
    if not isinstance(data, dict) or not isinstance(data.get("beat"), int) or data.get("phase") not in get_args(Phase):
        return None
    texts = {name: str(data.get(name, "")) for name in ("worker", "checkpoint", "entry", "error")}
    outcome: StageOutcome = data["outcome"] if data.get("outcome") in get_args(StageOutcome) else "ran"
    seconds = data.get("seconds")
    spent = {str(k): float(v) for k, v in seconds.items()} if isinstance(seconds, dict) else {}
    return Record(beat=data["beat"], phase=data["phase"], outcome=outcome, seconds=spent, **texts)


class Lease:
    """A worker's hold of a stage: reports every `beat_seconds`, and sets `stop` when the flow run is no longer this worker's."""

    def __init__(self, run: UUID, record: Record, beat_seconds: float, server_seconds: float) -> None:
        self.run, self.record, self.beat_seconds, self.server_seconds = run, record, beat_seconds, server_seconds
        self.stop, self._connection = threading.Event(), threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create the record, and report from a thread while inside; all requests use one connection."""
        with prefect_client(10.0) as self._client:
            self._artifact = insist(self._create, self.server_seconds)
            with in_background(self._report):
                yield

    def report(self) -> None:
        """Write the record now."""
        insist(self._send, self.server_seconds)

    def require(self) -> None:
        """Raise Interrupted if the flow run was taken away: the stage may be at work elsewhere, and its results count."""
        if self.stop.is_set() or not insist(self._is_ours, self.server_seconds):
            self.stop.set()
            raise Interrupted("the stage was given to another worker, or cancelled; its result here is not used")

    def _create(self) -> UUID:
        with self._connection:
            artifact = ArtifactCreate(type=TYPE, flow_run_id=self.run, data=vars(self.record))
            return self._client.create_artifact(artifact).id

    @own_retries()
    def _report(self, over: threading.Event) -> None:
        while not over.wait(self.beat_seconds):
            try:
                self._send()
                if not self._is_ours():
                    self.stop.set()
            except (httpx.HTTPError, ObjectNotFound):
                continue  # the server is away: go on; if it took the stage away meanwhile, the next report finds out

    def _send(self) -> None:
        with self._connection:
            self.record.beat += 1
            self._client.update_artifact(self._artifact, ArtifactUpdate(data=vars(self.record)))

    def _is_ours(self) -> bool:
        with self._connection:
            state = self._client.read_flow_run(self.run).state
        return state is not None and state.is_running()
