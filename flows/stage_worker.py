"""A worker of a pool: it takes stages from the pool's queues and runs each in a thread.

A process for each stage would import Prefect and DVC anew, which takes longer than a short stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import platform
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import ClassVar
from uuid import UUID

import anyio
import anyio.abc
import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.exceptions import ObjectNotFound
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_WORKER_QUERY_SECONDS, temporary_settings
from prefect.types._datetime import now
from prefect.variables import Variable
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from flows.stage import PRESENT, stage
from flows.workspace import fork_server
from pipelines.config.yaml_files import read_yaml
from posttrain.errors import Interrupted, OrchestrationError
from tasks.console import print_line
from tasks.pool.settings import CPU, FLOW, GPU, read_settings
from tasks.pool.work import Worker, blame
from tasks.remote import has_remote
from tasks.slots import cuda_devices, machine_slots

QUERY_SECONDS = 0.5
"""How often a worker with a free place asks for a stage; a full one sends no request."""
DRAIN_SECONDS = 2.0
"""How often a worker looks whether it was drained."""
REST_SECONDS = 20.0
"""After a fault of this machine, such as a full disk, other workers have time to take its stages."""
# Prefect looks classes of workers up by type and warns of a second one; this process makes its worker itself.
warnings.filterwarnings("ignore", message="Type 'StageWorker'")


class Drained(Exception):
    """The worker was drained or asked to end, and runs no stage any more."""


def worker_name(root: Path) -> str:
    """Return a worker's name: the host, and a few letters for the folder, of which a host may have several."""
    folder = hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:4]
    return f"{platform.node().lower()}-{folder}"


def variable(pool: str) -> str:
    """Return the name of the Prefect variable that lists the pool's drained workers."""
    return f"posttrain_drained_{pool.lower().replace('-', '_')}"


def drain(pool: str, name: str) -> str:
    """Ask a worker to finish its stages and end; return what was done. Raises OrchestrationError if no such worker is known."""
    known: list[str] = []
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectNotFound):
        known = sorted(each.name for each in client.read_workers_for_work_pool(pool))
    if name not in known:
        raise OrchestrationError(f"the pool {pool} has no worker {name!r}. Its workers: {', '.join(known) or 'none'}.")
    Variable.set(variable(pool), sorted({*_listed(pool), name}), overwrite=True)
    return f"{name} takes no new stage, and ends when it has finished its own"


def _listed(pool: str) -> set[str]:
    """Return the names of the pool's drained workers."""
    found: object = Variable.get(variable(pool), default="")
    return {str(each) for each in found} if isinstance(found, list) else set()


def serve(root: Path, pool: str, name: str) -> None:
    """Run a worker in this clone until a signal, or until it is drained."""
    read_settings(root, read_yaml(root / "dvc.yaml")["stages"])
    if not has_remote(root):
        raise OrchestrationError(
            f"{root} has no default DVC remote, through which a worker gets inputs and returns results: `python -m dvc remote add"
            " --default NAME URL`, the same as the flow's."
        )
    places, stop = len(machine_slots()), threading.Event()
    PRESENT[:] = [Worker(name, root, places, stop)]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    queues = {GPU, CPU} if cuda_devices() else {CPU}
    if name in _listed(pool):
        Variable.set(variable(pool), sorted(_listed(pool) - {name}), overwrite=True)
    print_line(f"worker {name}: {places} stages at once, from {' and '.join(sorted(queues))} of the pool {pool}")
    with temporary_settings(set_defaults={PREFECT_WORKER_QUERY_SECONDS: QUERY_SECONDS}), fork_server(root):
        worker = StageWorker(work_pool_name=pool, name=name, limit=places, work_queues=sorted(queues))
        worker.stop, worker.pool = stop, pool
        try:
            asyncio.run(worker.start(printer=lambda *_: None))
        except* Drained:
            print_line(f"worker {name} has ended")


class StageWorker(ProcessWorker):
    """Run stages of this pool's deployment with this clone's own code; any other flow run is refused."""

    stop: threading.Event
    pool: str
    _resting_until = 0.0
    _drained, _looked = False, -math.inf
    _deployments: ClassVar[set[UUID]] = set()
    """Deployments that were found to be the pool's own."""

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Take stages from the queues, unless the worker ends, is drained, or has just failed to run one."""
        ending = self.stop.is_set() or await self._is_drained()
        if ending and self.limiter.borrowed_tokens == 0:
            raise Drained
        if ending or time.monotonic() < self._resting_until:
            self._last_polled_time = now("UTC")
            return []
        return await super().get_and_submit_flow_runs()

    async def _is_drained(self) -> bool:
        """Return True if the worker's name is in the variable of drained workers, as of the last look."""
        if time.monotonic() > self._looked + DRAIN_SECONDS:
            found: object = await Variable.aget(variable(self.pool), default="")
            self._drained, self._looked = isinstance(found, list) and self.name in found, time.monotonic()
        return self._drained

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        """Return as many waiting stages as there are free places. Prefect's own method returns 200, each with its parameters."""
        free = int(self.limiter.available_tokens)
        if free == 0:
            return []
        body = {"work_queue_names": sorted(self._work_queues), "scheduled_before": str(now("UTC")), "limit": free}
        path = {"name": self._work_pool_name}
        try:
            found = await self.client.request(
                "POST", "/work_pools/{name}/get_scheduled_flow_runs", path_params=path, json=body
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 404:  # the pool was deleted; the worker's next heartbeat makes it again
                return []
            raise
        return WorkerFlowRunResponse.model_validate_list(found.json())

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run one stage. Raises OrchestrationError, which ends the flow run as Crashed, if it is not one of this pool."""
        await self._require_own(flow_run)
        if task_status is not None:
            task_status.started(os.getpid())
        print_line(f"{flow_run.name:<24} taken")
        began = time.monotonic()
        error = await anyio.to_thread.run_sync(_run_here, flow_run)
        words = "done" if error is None else f"not done: {error}"
        print_line(f"{flow_run.name:<24} {words} ({time.monotonic() - began:.1f} s)")
        if error is not None and not isinstance(error, Interrupted) and blame(error) == "lost":
            self._resting_until = time.monotonic() + REST_SECONDS
        return ProcessWorkerResult(status_code=0, identifier=str(flow_run.id))

    async def _require_own(self, flow_run: FlowRun) -> None:
        """Raise OrchestrationError if the flow run is of a different deployment than the pool's."""
        assert flow_run.deployment_id is not None
        if flow_run.deployment_id in self._deployments:
            return
        deployment = await self.client.read_deployment(flow_run.deployment_id)
        if deployment.name != self.pool or (await self.client.read_flow(deployment.flow_id)).name != FLOW:
            raise OrchestrationError(f"flow run {flow_run.name}: this worker runs only {FLOW}/{self.pool}")
        self._deployments.add(flow_run.deployment_id)

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: ProcessJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """Do nothing: a stage ends by itself when its flow run is not Running any more."""


def _run_here(flow_run: FlowRun) -> BaseException | None:
    """Run the stage's flow in this thread and return its error; the flow run's state and record hold it too."""
    try:
        run_flow(stage, flow_run=flow_run)
    except BaseException as error:  # the end of one stage must not end the worker
        return error
    return None
