"""The work pool whose workers run a flow's stages, if POSTTRAIN_POOL names one: its queues, its deployment, and its use by a flow."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from flows.stage import stage
from posttrain.errors import OrchestrationError
from tasks import stage as stages
from tasks.dag import Dag
from tasks.pool.send import Pool
from tasks.pool.settings import CPU, GPU, VARIABLE, read_settings

TEMPLATE = Path(__file__).parents[1] / "infra" / "work-pools" / "process.json"
ENTRY = "flows/stage.py:stage"
PRIORITIES = {GPU: 1, CPU: 2}
"""Work queues; a worker with a GPU takes first the stages that need it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
Workers = Pool | None
"""The pool of a flow, or None if its stages run on this machine."""


@contextmanager
def workers_of_pool(root: Path, whole: Dag) -> Iterator[Workers]:
    """Yield the pool that POSTTRAIN_POOL names, or None.

    Raises OrchestrationError if there is no Prefect server, no remote, or if code differs from the commit.
    """
    name = os.environ.get(VARIABLE, "").strip()
    if not name:
        yield None
        return
    require_pool_server(name)
    settings = read_settings(root, {node.name: node for node in whole.values() if node.kind == "stage"})
    pool = Pool(root, name, whole, settings, str(flow_run.get_id() or ""))
    with pool.open(prepare(name), stages.stop):
        yield pool


def require_pool_server(name: str) -> None:
    """Raise OrchestrationError if the pool's name is not usable, or no Prefect server is configured, which a pool needs."""
    if not _NAME.fullmatch(name):
        raise OrchestrationError(f"{name!r} is not the name of a work pool: use letters, digits, _ and -.")
    if not PREFECT_API_URL.value():
        raise OrchestrationError(
            f"the work pool {name} needs a Prefect server that its workers reach: set PREFECT_API_URL (`make up` starts one on this"
            f" machine), or unset {VARIABLE} to run the stages here."
        )


def prepare(name: str) -> UUID:
    """Create or update the pool, its two queues, and the deployment of a stage; return the deployment's id.

    Safe to repeat, by workers and flows at once. Raises OrchestrationError if a pool of a different type has this name.
    """
    with get_client(sync_client=True) as client:
        template = json.loads(TEMPLATE.read_text(encoding="utf-8"))
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        kind = client.read_work_pool(name).type
        if kind != "process":
            raise OrchestrationError(
                f"the work pool {name} has the type {kind}. Workers of stages are processes, also those in a container, in a pod or in a"
                " SLURM job, so their pool must have the type process: choose a different name."
            )
        for queue, priority in PRIORITIES.items():
            _queue(client, name, queue, priority)
        return client.create_deployment(
            client.create_flow(stage),
            name,
            work_pool_name=name,
            work_queue_name=CPU,
            entrypoint=ENTRY,
            path=".",
            tags=["posttrain"],
            parameter_openapi_schema=stage.parameters.model_dump(),
            enforce_parameter_schema=False,
        )


def _queue(client: SyncPrefectClient, pool: str, name: str, priority: int) -> None:
    try:
        client.read_work_queue_by_name(name, work_pool_name=pool)
    except ObjectNotFound:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_queue(name, work_pool_name=pool, priority=priority)
