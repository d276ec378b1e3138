"""Show the runs of this project: start MLflow and Prefect on this machine only, and print useful links.

    posttrain ui [--port 5000] [--prefect-port 4200]

Copies the journals into MLflow first. Ctrl-C stops the servers. If MLFLOW_TRACKING_URI or PREFECT_API_URL names a server, or `make serve`
is running, only the links to that server are printed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from pipelines.commands.sync import synchronise
from pipelines.config.params import load_params
from pipelines.runtime import credentials, environment
from pipelines.runtime.command_line import PORT, command_parser, ends_with_ctrl_c, reports_errors
from pipelines.runtime.garbage import library_command
from pipelines.runtime.listening import listens
from pipelines.runtime.redaction import redact
from pipelines.tracking.server import SERVER
from pipelines.tracking.store import artifact_root, create_database, experiment_id, open_client, tracking_uri
from pipelines.tracking.views import FILTER, TRAINING_PAGES, runs_page
from posttrain import network
from posttrain.errors import Interrupted, TrackingError
from posttrain.guard import signal_at_parents_death

if TYPE_CHECKING:
    from mlflow import MlflowClient

_HOST = network.HOST
_START_SECONDS = 300.0


def links(client: MlflowClient, base: str, experiment: str) -> dict[str, str]:
    """Return links by name: the algorithms' curves in shared charts, their results in a table, all runs, the models.

    By default MLflow opens an experiment on its pages for agents, so each link asks for the training pages.
    """
    page = f"{base}/#/experiments/{experiment}/runs?{TRAINING_PAGES}"
    found: dict[str, str] = {}
    if client.search_runs([experiment], FILTER, max_results=1):
        found["curves of the algorithms"] = f"{base}{runs_page(experiment)}&compareRunsMode=CHART"
        found["results of the algorithms side by side"] = f"{base}{runs_page(experiment)}&compareRunsMode=TABLE"
    found["every run"] = page
    for model in client.search_registered_models():
        found[f"versions of the model {model.name}"] = f"{base}/#/models/{quote(model.name)}?{TRAINING_PAGES}"
    return found


@dataclass(frozen=True)
class UiServer:
    """One of the two servers, reachable only from this machine. `health` is the path that responds when the server is up."""

    name: str
    command: list[str]
    base: str
    health: str
    environment: dict[str, str] = field(default_factory=dict)


def mlflow_server(project: Path, port: int) -> UiServer:
    """Return an MLflow server over the project's store, with accounts. Its address may hold a password: environment."""
    store = ["--no-serve-artifacts", "--default-artifact-root", artifact_root(project).as_uri()]
    home = project / credentials.FOLDER
    extra = credentials.mlflow_server(
        home / "mlflow-auth.ini",
        f"sqlite:///{home / 'mlflow-accounts.db'}",
        credentials.secret(project, "mlflow"),
        credentials.secret(project, "flask"),
    )
    command = [sys.executable, "-m", SERVER, "server", *store, *credentials.mlflow_options(port)]
    address = {"MLFLOW_BACKEND_STORE_URI": tracking_uri(project)}
    return UiServer("MLflow", command, f"http://{_HOST}:{port}", "/health", extra | address)


def prefect_server(project: Path, port: int) -> UiServer:
    """Return a Prefect server over the database that the flows' private servers use, ~/.prefect."""
    base = f"http://{_HOST}:{port}"
    command = library_command("prefect", "server", "start", "--host", _HOST, "--port", str(port))
    extra = credentials.prefect_server(credentials.prefect_auth(project), port)
    return UiServer("Prefect", command, base, "/api/health", extra)


def free_port(wanted: int, command: str, make: str) -> int:
    """Return the port if it is free, or any free port for 0. `command` and `make` are the two ways to ask for a free one."""
    if not 0 <= wanted <= 65535:
        raise TrackingError(f"port {wanted}: a port is a number up to 65535; 0 takes a free one")
    try:
        return network.free_port(wanted)
    except OSError as error:
        raise TrackingError(
            f"port {wanted} on {_HOST}: {error.strerror}. Stop what listens there, or take a free one: `{command}`, with make `{make}`"
        ) from None


def serve(servers: Sequence[UiServer], project: Path, found: str) -> None:
    """Run the servers until Ctrl-C or SIGTERM, then stop them and everything they started."""
    log = project / ".posttrain" / "logs" / "prefect-ui.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[bytes]] = []
    try:
        with log.open("wb") as quiet:
            for server in servers:
                # Prefect's start-up message would hide the links.
                output = quiet if server.name == "Prefect" else None
                running.append(_start(server, project, output))
        for server, process in zip(servers, running, strict=True):
            _wait_until_up(server, process)
            print(f"{server.name} answers at {server.base}", flush=True)
        print(f"{found}\n{_sign_in(project)}\nCtrl-C stops them", flush=True)
        while all(process.poll() is None for process in running):
            time.sleep(0.5)
        name, code = next((s.name, p.returncode) for s, p in zip(servers, running, strict=True) if p.poll() is not None)
        raise TrackingError(f"the {name} server ended with exit code {code}; its messages are above, or in {log}.")
    finally:
        for process in running:
            _stop(process)


def _sign_in(project: Path) -> str:
    folder = project / credentials.FOLDER
    return (
        f"sign in to MLflow as {credentials.ADMIN} with the password in {folder / 'mlflow'}; to Prefect with"
        f" {credentials.USER}:PASSWORD, the password is in {folder / 'prefect'}"
    )


def _start(server: UiServer, project: Path, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        server.command,
        cwd=project,
        env={**os.environ, **server.environment},
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=signal_at_parents_death,
    )


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server's process group: SIGTERM, then SIGKILL."""
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(server.pid, number)
            server.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _wait_until_up(server: UiServer, process: subprocess.Popen[bytes]) -> None:
    url = f"{server.base}{server.health}"
    port = int(server.base.rpartition(":")[2])

    def is_up() -> bool:
        return network.answers(url) and listens(process.pid, port)

    if network.wait_until(is_up, lambda: process.poll() is None, _START_SECONDS):
        return
    if process.poll() is not None:
        raise TrackingError(
            f"the {server.name} server did not start (exit code {process.returncode}); its messages are above."
        )
    raise TrackingError(f"the {server.name} server did not answer at {server.base} within {_START_SECONDS:.0f} s.")


def _links(project: Path, base: str) -> str:
    """Return the links as text, after copying the journals."""
    synchronise(project, 0.0)
    client = open_client(project)
    experiment = experiment_id(client, load_params(project / "params.yaml").project.experiment, project)
    return "\n".join(f"{name}:\n  {link}" for name, link in links(client, base, experiment).items())


@reports_errors
@ends_with_ctrl_c
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain ui", __doc__)
    parser.add_argument(
        "--port", type=PORT, default=5000, help="port of MLflow on 127.0.0.1; 0 chooses a free one (default: 5000)"
    )
    parser.add_argument(
        "--prefect-port", type=PORT, default=4200, help="port of Prefect; 0 chooses a free one (default: 4200)"
    )
    args = parser.parse_args(argv)
    environment.quiet()
    project = environment.root()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        environment.require_writable(project)
        _show(project, args.port, args.prefect_port)
    except Interrupted:
        return 0
    return 0


def _show(project: Path, port: int, prefect_port: int) -> None:
    """Start the servers that are needed and print the links."""
    servers = []
    uri, api = tracking_uri(project), os.environ.get("PREFECT_API_URL") or credentials.running_prefect(project)
    base = redact(uri).rstrip("/")
    if not uri.startswith(("http://", "https://")):
        create_database(project)
        servers.append(mlflow_server(project, free_port(port, "posttrain ui --port 0", "make ui PORT=0")))
        base = servers[-1].base
    if not api:
        servers.append(
            prefect_server(project, free_port(prefect_port, "posttrain ui --prefect-port 0", "make ui PREFECT_PORT=0"))
        )
    found = _links(project, base)
    if api:
        found += f"\nflow runs:\n  {redact(api).removesuffix('/api')}/runs"
    if servers:
        serve(servers, project, found)
    else:
        print(found)


def _interrupt(*_: object) -> None:
    """Raise Interrupted on a signal."""
    raise Interrupted("stopped")


if __name__ == "__main__":
    sys.exit(main())
