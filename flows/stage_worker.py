"""A worker of a pool: it takes stages from the pool's queues and runs each in a thread.

A process for each stage would import Prefect and DVC anew, which takes longer than a short stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
import signal
import threading
import time
import warnings
from pathlib import Path

import anyio
import anyio.abc
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.flow_engine import run_flow
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

QUERY_SECONDS = 1.0
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
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", str(QUERY_SECONDS))
    with fork_server(root):
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

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Take stages from the queues, unless the worker ends, is drained, or has just failed to run one."""
        ending = self.stop.is_set() or self.name in (await self._drained())
        if ending and self.limiter.borrowed_tokens == 0:
            raise Drained
        if ending or time.monotonic() < self._resting_until:
            self._last_polled_time = now("UTC")
            return []
        return await super().get_and_submit_flow_runs()

    async def _drained(self) -> list[object]:
        found: object = await Variable.aget(variable(self.pool), default="")
        return found if isinstance(found, list) else []

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run one stage. Raises OrchestrationError, which ends the flow run as Crashed, if it is not one of this pool."""
        assert flow_run.deployment_id is not None
        deployment = await self.client.read_deployment(flow_run.deployment_id)
        if deployment.name != self.pool or (await self.client.read_flow(deployment.flow_id)).name != FLOW:
            raise OrchestrationError(f"flow run {flow_run.name}: this worker runs only {FLOW}/{self.pool}")
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
