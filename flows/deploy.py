"""Deploy prefect.yaml to a Prefect server: work pool, queues, schedules, and an automation that marks dead flow runs.

    python -m flows.deploy [--type process|docker|kubernetes]

PREFECT_API_URL names the server. The command is safe to repeat: it updates existing objects. Retraining and comparison share a
queue with one place, because both work in one workspace; a promotion that waits for a person does not block them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from prefect.automations import Automation
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL

from flows.deployments import (
    apply_schedules,
    container_tag,
    mark_owner,
    project_tag,
    read_entries,
    read_pauses,
    refuse_foreign,
)
from flows.server import require_server
from flows.workspace import SILENCE_SECONDS, SILENT
from pipelines.config.params import load_params
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, reports_errors
from pipelines.runtime.garbage import library_command
from posttrain.errors import OrchestrationError
from tasks.process import child_environment

POOL, TRAINING, APPROVALS = "posttrain", "training", "approvals"  # as in prefect.yaml
DEAD = "posttrain: flow runs without a heartbeat"
TEMPLATES = Path(__file__).parents[1] / "infra" / "work-pools"
HEARTBEAT_SECONDS = 30


async def prepare(pool: str, kind: str) -> None:
    """Create or update the work pool, its two queues, and the automation."""
    async with get_client() as client:
        with contextlib.suppress(ObjectAlreadyExists):
            template = json.loads((TEMPLATES / f"{kind}.json").read_text(encoding="utf-8"))
            await client.create_work_pool(WorkPoolCreate(name=pool, type=kind, base_job_template=template))
        await _queue(client, pool, TRAINING, 1)
        await _queue(client, pool, APPROVALS, None)
    await _watch_heartbeats()


async def _queue(client: PrefectClient, pool: str, name: str, limit: int | None) -> None:
    """Create a work queue or update its concurrency limit."""
    try:
        queue = await client.read_work_queue_by_name(name, work_pool_name=pool)
        await client.update_work_queue(queue.id, concurrency_limit=limit)
    except ObjectNotFound:
        await client.create_work_queue(name, work_pool_name=pool, concurrency_limit=limit)


async def _watch_heartbeats() -> None:
    """Create or update the automation that marks a run Crashed after SILENCE_SECONDS without a heartbeat.

    It catches runs whose process and worker are both gone: nothing else would report them.
    """
    ended = {
        f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
    }
    trigger = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *ended},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=SILENCE_SECONDS),
    )
    action = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=SILENT, force=False)
    automation = Automation(name=DEAD, trigger=trigger, actions=[action])
    try:
        existing = await Automation.aread(name=DEAD)
    except ValueError:
        await automation.acreate()
        return
    existing.trigger, existing.actions = automation.trigger, automation.actions
    await existing.aupdate()


def deploy(root: Path, kind: str) -> None:
    """Deploy every entry of prefect.yaml.

    Raises OrchestrationError with Prefect's output if that fails, and before anything changes if a different project serves deployments
    of these names from the same server.
    """
    entries = read_entries(root / "prefect.yaml")
    tag = _owner(root, kind)
    refuse_foreign(entries, root, tag)
    before = read_pauses(entries)
    asyncio.run(prepare(POOL, kind))
    command = library_command("prefect", "--no-prompt", "deploy", "--all")
    project = _container_folder(kind) or str(root.absolute())
    done = subprocess.run(
        command, cwd=root, env=child_environment({"POSTTRAIN_PROJECT": project}), capture_output=True, text=True
    )
    if done.returncode:
        raise OrchestrationError(f"`prefect deploy --all` failed:\n{(done.stdout + done.stderr)[-3000:]}")
    mark_owner(entries, tag)
    apply_schedules(entries, before)


def _owner(root: Path, kind: str) -> str:
    """Return the tag that marks this project's deployments among those of others on the same server."""
    folder = _container_folder(kind)
    if folder is None:
        return project_tag(root)
    return container_tag(load_params(root / "params.yaml").project.experiment, folder)


def _container_folder(kind: str) -> str | None:
    """Return the project's folder in a container: /app, as infra/Dockerfile builds it, unless POSTTRAIN_PROJECT is set."""
    return os.environ.get("POSTTRAIN_PROJECT") or (None if kind == "process" else "/app")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("python -m flows.deploy", __doc__)
    parser.add_argument(
        "--type",
        default="process",
        choices=("process", "docker", "kubernetes"),
        help="type of a new work pool (default: process)",
    )
    args = parser.parse_args(argv)
    url = PREFECT_API_URL.value()
    if not url:
        raise OrchestrationError(
            "deploying needs a Prefect server: set PREFECT_API_URL, or use `make up` or `make serve`."
        )
    require_server(url)
    deploy(environment.root(), args.type)
    print(f"deployed: retrain/nightly, compare/weekly and promote/promote, to the work pool {POOL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
