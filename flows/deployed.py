"""Run the flow that this project's prefect.yaml names, also if the server's record of its deployment names a different one.

Whoever has the server's password can change that record. Prefect would run the record's entry point and pull steps in the flow's
process, and for hooks in the process of the worker or of `make serve`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import prefect.runner.runner
import prefect.workers.process
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from flows.deployments import find_flow
from posttrain.errors import OrchestrationError

NAME = "PREFECT__DEPLOYMENT_NAME"
"""Prefect's variable with the name under which this machine has deployed the flow."""
ENVIRONMENT = {"PREFECT__FLOW_ENTRYPOINT": f"{__name__}.flow"}
"""Makes the process of a flow run load `flow` of this module, and skip the record's pull steps."""


def __getattr__(name: str) -> Flow[..., Any]:
    """Return `flow`, the one of the deployment that this process runs."""
    if name != "flow":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return find_flow(Path.cwd() / "prefect.yaml", os.environ[NAME])


def keep_own_code() -> None:
    """Let hooks of flow runs, which this process calls if a flow's process is gone, come from prefect.yaml too."""
    for module in (prefect.runner.runner, prefect.workers.process):
        assert hasattr(module, "load_flow_from_flow_run")
        vars(module)["load_flow_from_flow_run"] = _load


async def _load(flow_run: FlowRun, **_: Any) -> Flow[..., Any]:
    """Return the flow of a run. Raises OrchestrationError if it has no deployment."""
    if flow_run.deployment_id is None:
        raise OrchestrationError(f"flow run {flow_run.name} has no deployment; only those of prefect.yaml run here.")
    async with get_client() as client:
        deployment = await client.read_deployment(flow_run.deployment_id)
    return find_flow(Path.cwd() / "prefect.yaml", deployment.name)
