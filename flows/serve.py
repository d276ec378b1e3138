"""Run the schedules on one machine: a Prefect server with its UI, and the flows of prefect.yaml at their scheduled times.

    python -m flows.serve [--port 4200]

Runs until Ctrl-C, without work pool and worker: each flow run is a child process of this command. If PREFECT_API_URL is set, that
server is used. Past runs are stored in ~/.prefect; models and metrics are stored in the project, as always.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import serve
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from flows.server import wait_until_healthy
from flows.signals import raise_interrupt
from flows.workspace import sweep
from pipelines.commands.ui import free_port
from pipelines.config.params import read_yaml
from pipelines.runtime import credentials, environment
from pipelines.runtime.redaction import report_error
from posttrain.errors import PosttrainError
from tasks.console import print_line
from tasks.process import end, start


def deployments(path: Path) -> list[RunnerDeployment]:
    """Return prefect.yaml's deployments as processes of this command, with the same names, times, parameters and limits."""
    return [_deployment(entry) for entry in read_yaml(path)["deployments"]]


def _deployment(entry: dict[str, Any]) -> RunnerDeployment:
    """Return one entry of prefect.yaml as a deployment."""
    module, function = entry["entrypoint"].split(":")
    flow = getattr(importlib.import_module(module.removesuffix(".py").replace("/", ".")), function)
    deployment: RunnerDeployment = flow.to_deployment(
        name=entry["name"],
        schedules=[Cron(each["cron"], timezone=each.get("timezone", "UTC")) for each in entry["schedules"]],
        parameters=entry["parameters"],
        description=entry["description"],
        tags=entry["tags"],
    )
    return deployment


@contextmanager
def server(root: Path, port: int) -> Iterator[str]:
    """Yield the URL of Prefect's UI: of the configured server, or of a private one that ends with this command."""
    configured = PREFECT_API_URL.value()
    if configured:
        yield PREFECT_UI_URL.value() or configured.removesuffix("/api")
        return
    port = free_port(port)
    base, log = f"http://127.0.0.1:{port}", root / ".posttrain" / "logs" / "prefect.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    auth = credentials.prefect_auth(root)
    process = _start_server(root, port, log, auth)
    try:
        wait_until_healthy(process, f"{base}/api", log)
        # For this process, and for those of the flow runs.
        address = {"PREFECT_API_URL": f"{base}/api", "PREFECT_UI_URL": base}
        os.environ.update(address | credentials.prefect_client(auth))
        with temporary_settings({PREFECT_API_URL: f"{base}/api", PREFECT_UI_URL: base, PREFECT_API_AUTH_STRING: auth}):
            yield base
    finally:
        process.terminate()
        end(process, 20)


def _start_server(root: Path, port: int, log: Path, auth: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        extra = credentials.prefect_server(auth, port)
        return start(command, root, output=output, extra=extra, grace_seconds=5)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--port", type=int, default=4200, help="port of the Prefect server; 0 chooses a free one (default: 4200)"
    )
    args = parser.parse_args(argv)
    root = environment.root()
    os.chdir(root)
    signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        with server(root, args.port) as pages:
            sweep(root)
            (root / "inbox").mkdir(exist_ok=True)
            found = deployments(root / "prefect.yaml")
            for deployment in found:
                hours = ", ".join(str(each.schedule.cron) for each in deployment.schedules or ()) or "by hand"  # type: ignore[union-attr]
                print_line(f"{deployment.flow_name}/{deployment.name}: {hours}")
            print_line(
                f"Prefect: {pages}   inbox for new data: {os.environ.get('POSTTRAIN_INBOX') or root / 'inbox'}   Ctrl-C stops"
            )
            serve(*found, print_starting_message=False)
    except PosttrainError as error:
        return report_error(error)
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
