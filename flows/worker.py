"""Run a worker of this workspace: it polls the work pool for flow runs and starts each in its own process.

    python -m flows.worker [--pool posttrain]

PREFECT_API_URL names the server. A flow run that died with the worker before this one, also before it began, is marked Crashed first,
which gives its place in the queue back; the next run goes on from its checkpoints. Flow runs that are not those of this project's
prefect.yaml are refused.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import anyio.abc
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import PREFECT_API_URL
from prefect.utilities.processutils import command_to_string, setup_signal_handlers_worker
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from flows import deployed
from flows.deploy import HEARTBEAT_SECONDS
from flows.deployments import read_entries
from flows.server import require_server
from flows.unstarted import end_unstarted
from flows.workspace import sweep
from pipelines.config.yaml_files import read_yaml
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, reports_errors
from posttrain.errors import OrchestrationError

PULL = "prefect.deployments.steps.set_working_directory"
ENVIRONMENT = {"POSTTRAIN_SLOTS", "POSTTRAIN_GRACE_SECONDS", "CUDA_VISIBLE_DEVICES"}
"""Variables that a flow run may set: they select its machine, not its code."""


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("python -m flows.worker", __doc__)
    parser.add_argument("--pool", default="posttrain", help="name of the work pool (default: posttrain)")
    args = parser.parse_args(argv)
    root = environment.root()
    environment.require_writable(root)
    url = PREFECT_API_URL.value()
    if not url:
        raise OrchestrationError(
            "a worker needs a Prefect server: set PREFECT_API_URL, start servers and a worker with `make up`,"
            " or use `make serve`, which needs no worker."
        )
    require_server(url)
    sweep(root)
    names = [entry.name for entry in read_entries(root / "prefect.yaml")]
    end_unstarted(names, pool=args.pool, worker=os.uname().nodename)
    asyncio.run(work(root, args.pool))
    return 0


async def work(root: Path, pool: str) -> None:
    """Poll the pool until a signal ends this process."""
    os.chdir(root)
    deployed.keep_own_code()
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS))
    setup_signal_handlers_worker(os.getpid(), "the process worker", print)
    worker = ProjectWorker(work_pool_name=pool, name=os.uname().nodename)
    worker.root = root
    await worker.start()


class ProjectWorker(ProcessWorker):
    """Run only deployments of this project's prefect.yaml; otherwise any user of the server could run any command here."""

    root: Path

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run a flow run of ours. Raises OrchestrationError, which ends it as Crashed, for any other."""
        if flow_run.deployment_id is None:
            raise OrchestrationError(
                f"flow run {flow_run.name}: has no deployment; this worker runs prefect.yaml's only."
            )
        deployment = await self.client.read_deployment(flow_run.deployment_id)
        wrong = foreign(deployment, flow_run, configuration, self.root)
        if wrong:
            raise OrchestrationError(
                f"flow run {flow_run.name} of {deployment.name} is refused: its {wrong} is not the one that prefect.yaml of"
                f" {self.root} gives. Deploy again with `python -m flows.deploy`, and change the server's password if"
                " no user of this project changed the deployment."
            )
        only_own_code(configuration, deployment.name, self.root)
        return await super().run(flow_run, configuration, task_status)


def only_own_code(configuration: ProcessJobConfiguration, name: str, root: Path) -> None:
    """Make a run of the deployment load the flow of prefect.yaml, in this folder and with this worker's environment.

    The server's record may have changed since it was checked, and the work pool's template can set variables and a command too.
    """
    allowed = {key: value for key, value in configuration.env.items() if key in ENVIRONMENT}
    configuration.env = allowed | deployed.ENVIRONMENT | {deployed.NAME: name}
    configuration.working_dir = root
    configuration.command = command_to_string([sys.executable, "-m", "prefect.engine"])
    configuration._command_configured = True  # else Prefect runs the deployment's pull steps to find a command


def foreign(
    deployment: DeploymentResponse, flow_run: FlowRun, configuration: ProcessJobConfiguration, root: Path
) -> str | None:
    """Return the first setting of a flow run that could run something else than this project's flows, or None."""
    tree = read_yaml(root / "prefect.yaml")
    ours = {entry["name"]: entry["entrypoint"] for entry in tree["deployments"]}
    variables = {**(deployment.job_variables or {}), **(flow_run.job_variables or {})}
    asked = set(variables.pop("env", None) or {})
    checks = {
        "entry point": deployment.entrypoint != ours.get(deployment.name, ""),
        "pull step": not _is_our_pull(deployment.pull_steps, root),
        "storage": deployment.storage_document_id is not None,
        "command": configuration._command_configured,
        "working directory": configuration.working_dir is not None,
        "job variables": bool(variables or asked - ENVIRONMENT),
    }
    return next((name for name, differs in checks.items() if differs), None)


def _is_our_pull(steps: list[dict[str, Any]] | None, root: Path) -> bool:
    """Return True if the only step enters this project's folder."""
    if not steps or len(steps) != 1 or set(steps[0]) != {PULL}:
        return False
    values = steps[0][PULL]
    return set(values) == {"directory"} and Path(values["directory"]).resolve() == root.resolve()


if __name__ == "__main__":
    sys.exit(main())
