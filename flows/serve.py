"""Run the schedules on one machine: a Prefect server with its UI, and the flows of prefect.yaml at their scheduled times.

    python -m flows.serve [--port 4200]

Runs until Ctrl-C, without work pool and worker: each flow run is a child process of this command. If PREFECT_API_URL is set, that
server is used. Past runs are stored in ~/.prefect; models and metrics are stored in the project, as always.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from prefect import serve
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from flows import deployed
from flows.deployments import (
    Entry,
    Pauses,
    project_tag,
    read_entries,
    read_pauses,
    refuse_foreign,
    remove_old_schedules,
)
from flows.server import announced, only_serving, wait_until_healthy
from flows.signals import raise_interrupt
from flows.unstarted import end_unstarted
from flows.workspace import SERVING_PROCESS, sweep
from pipelines.commands.ui import free_port
from pipelines.data.inbox import location
from pipelines.data.inbox_folder import open_inbox
from pipelines.runtime import credentials, environment
from pipelines.runtime.command_line import PORT, command_parser, ends_with_ctrl_c, reports_errors
from pipelines.runtime.environment import require_writable
from pipelines.runtime.garbage import library_command
from pipelines.runtime.process import stopping_signals
from pipelines.runtime.redaction import redact
from posttrain.environments.parts import KINDS
from tasks.console import print_line
from tasks.process import end, start

AGAIN = "started again"
"""Tag of a run that replaces a killed one."""


def deployments(entries: Sequence[Entry], before: Mapping[str, Pauses]) -> list[RunnerDeployment]:
    """Return prefect.yaml's deployments as processes of this command, with the same names, times, parameters and pauses."""
    return [_deployment(entry, before.get(entry.full_name, Pauses())) for entry in entries]


def _deployment(entry: Entry, pauses: Pauses) -> RunnerDeployment:
    """Return one entry of prefect.yaml as a deployment."""
    deployment: RunnerDeployment = entry.flow.to_deployment(  # type: ignore[assignment]
        name=entry.name,
        schedules=[Cron(each.cron, timezone=each.timezone, active=pauses.active(each)) for each in entry.schedules],
        parameters=dict(entry.parameters),
        description=entry.description,
        tags=[*entry.tags, project_tag(Path.cwd())],
        paused=pauses.paused,
    )
    return deployment


def describe(entry: Entry, pauses: Pauses) -> str:
    """Return a deployment's times in one line, with its pauses."""
    times = [
        f"{each.cron} {each.timezone}" + ("" if pauses.active(each) else " (PAUSED in Prefect's UI, or active: false)")
        for each in entry.schedules
    ]
    whole = "   PAUSED: resume it in Prefect's UI" if pauses.paused else ""
    return f"{entry.full_name}: {', '.join(times) or 'by hand'}{whole}"


def forget_missed(entries: Sequence[Entry]) -> int:
    """Delete runs whose time passed while nothing served them, and return their number: the next night takes in all new data."""
    with get_client(sync_client=True) as client:
        waiting = FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),  # type: ignore[arg-type]
        )
        names = DeploymentFilter(name=DeploymentFilterName(any_=[entry.name for entry in entries]))
        missed = [
            run for run in client.read_flow_runs(flow_run_filter=waiting, deployment_filter=names) if run.auto_scheduled
        ]
        for run in missed:
            client.delete_flow_run(run.id)
    return len(missed)


@contextmanager
def server(root: Path, port: int) -> Iterator[str]:
    """Yield the URL of Prefect's UI: of the configured server, or of a private one that ends with this command."""
    configured = PREFECT_API_URL.value()
    if configured:
        yield PREFECT_UI_URL.value() or configured.removesuffix("/api")
        return
    port = free_port(port, "python -m flows.serve --port 0", "make serve PREFECT_PORT=0")
    base, log = f"http://127.0.0.1:{port}", root / ".posttrain" / "logs" / "prefect.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    auth = credentials.prefect_auth(root)
    process = _start_server(root, port, log, auth)
    try:
        wait_until_healthy(process, port, log)
        # For this process, and for those of the flow runs.
        address = {"PREFECT_API_URL": f"{base}/api", "PREFECT_UI_URL": base}
        os.environ.update({SERVING_PROCESS: str(os.getpid())} | address | credentials.prefect_client(auth))
        with temporary_settings({PREFECT_API_URL: f"{base}/api", PREFECT_UI_URL: base, PREFECT_API_AUTH_STRING: auth}):
            yield base
    finally:
        process.terminate()
        end(process, 20)


def _start_server(root: Path, port: int, log: Path, auth: str) -> subprocess.Popen[bytes]:
    command = library_command("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with log.open("wb") as output:
        extra = credentials.prefect_server(auth, port)
        return start(command, root, output=output, extra=extra, grace_seconds=5)


def _serve(root: Path, entries: Sequence[Entry], pages: str) -> None:
    """Register the deployments and run them until Ctrl-C. A pause outlives this command: it is kept on the server."""
    refuse_foreign(entries, root, project_tag(root))
    killed = sweep(root, wait=True)
    unstarted = end_unstarted([entry.name for entry in entries])
    before = read_pauses(entries)
    remove_old_schedules(entries, before)
    missed = forget_missed(entries)
    for entry in entries:
        print_line(describe(entry, before.get(entry.full_name, Pauses())))
    if missed:
        print_line(
            f"{missed} runs whose time passed while nothing was serving are dropped; the next one takes in all new data"
        )
    for run in [killed, *unstarted]:
        if run is not None:
            print_line(start_again(run))
    os.environ.update(deployed.ENVIRONMENT)
    deployed.keep_own_code()
    print_line(f"Prefect: {pages}   inbox for new data: {redact(location(root))}   Ctrl-C stops")
    serve(*deployments(entries, before), pause_on_shutdown=False, print_starting_message=False)


def start_again(killed: FlowRun) -> str:
    """Start a run that was killed with its command once more, and return one line about it.

    A run that was already started again is not: it may be the cause.
    """
    if killed.deployment_id is None or AGAIN in killed.tags:
        return f"{killed.name} is not started again; the next scheduled run continues from its checkpoints"
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(
            killed.deployment_id, parameters=killed.parameters, tags=[AGAIN], idempotency_key=f"again-{killed.id}"
        )
    return f"{killed.name} is started again as {run.name}, and continues from its checkpoints"


def _make_inbox(root: Path) -> None:
    """Make the inbox with a folder for each table. Raises DataError if POSTTRAIN_INBOX names a folder that does not exist."""
    if os.environ.get("POSTTRAIN_INBOX"):
        open_inbox(location(root), required=True)
        return
    for kind in KINDS:
        (root / "inbox" / kind).mkdir(parents=True, exist_ok=True)


@reports_errors
@ends_with_ctrl_c
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("python -m flows.serve", __doc__)
    parser.add_argument(
        "--port", type=PORT, default=4200, help="port of the Prefect server; 0 chooses a free one (default: 4200)"
    )
    args = parser.parse_args(argv)
    root = environment.root()
    os.chdir(root)
    for number in stopping_signals():
        signal.signal(number, raise_interrupt)
    require_writable(root)
    entries = read_entries(root / "prefect.yaml")
    _make_inbox(root)
    with only_serving(root), server(root, args.port) as pages, announced(root, pages):
        _serve(root, entries, pages)
    return 0


if __name__ == "__main__":
    sys.exit(main())
